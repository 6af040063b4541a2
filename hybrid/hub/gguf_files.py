"""Which GGUF files of a repository a name means. Loads no client."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hybrid.errors import CheckpointError
from hybrid.gguf.header import ENDING
from hybrid.hub.names import HubName

#: What GGUF files of the same repository are that are no model of text.
_BESIDE_GGUF = re.compile(r"(?i)mmproj|imatrix|^mtp-")
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
_QUANT = re.compile(r"(?i)(?:^|[-._])((?:UD-)?I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4)")
_USUAL = "Q4_K_M"
"""Of several files the one that is taken unless another is asked for, as llama.cpp does."""


def chosen(name: HubName, there: dict[str, int]) -> tuple[HubName, list[str]]:
    """Return the GGUF files that a name means, and the name that says so; none for safetensors.

    Raises
    ------
    CheckpointError
        When it could be none or several.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(there):
        stem = Path(file).name.removesuffix(ENDING)
        if file.endswith(ENDING) and not _BESIDE_GGUF.search(stem):
            models.setdefault(_PART.sub("", stem), []).append(file)
    safetensors = any(file.endswith(".safetensors") for file in there)
    if name.quant is None and (safetensors or not models):
        return name, []
    quants = {_quant(stem): files for stem, files in models.items()}
    if name.quant is not None:
        wanted = name.quant
    else:
        wanted = _USUAL if _USUAL in quants else next(iter(quants)) if len(quants) == 1 else ""
    files = next((files for quant, files in quants.items() if quant == wanted.upper()), [])
    count = _PART.search(Path(files[0]).stem) if files else None
    if count is not None and len(files) != int(count[1]):
        raise CheckpointError(
            f"{name} has {len(files)} of the {int(count[1])} files of {wanted}",
            hint="ask its publisher, or choose another",
        )
    if not files:
        raise CheckpointError(
            f"{name} has no GGUF file of " + (wanted or "a usual size"),
            hint=f"choose one of: {', '.join(f'{name.repo}:{quant}' for quant in sorted(quants))}"
            if quants
            else "name a repository of GGUF files, or leave out what follows :",
        )
    return replace(name, quant=wanted.upper()), files


def _quant(stem: str) -> str:
    """Return what a file's name says its weights are: the last part that looks like a type."""
    found: list[str] = _QUANT.findall(stem)
    return found[-1].upper() if found else stem
