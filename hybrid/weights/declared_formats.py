"""Tells in which format a checkpoint's weights were published, wherever it is declared.

Publishers say it in ``config.json``, in a file beside it, or only by the names and types of
their tensors. What cannot be read is refused by its right name, with a way that exists: there
may be no unquantized original. Loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.weights.source_files import TensorInfo, read_object

#: ``quant_method`` of the checkpoints that can be dequantized.
SOURCES = ("fp8", "mxfp8", "mxfp4")

_READ = "bf16, f16 or f32, fp8 or mxfp8 in blocks, or mxfp4"
_ANOTHER = f"look for a copy in {_READ}, the publisher's or another's"

#: What turns a checkpoint into one that can be read, by the name of its format.
_WAYS = {
    "compressed-tensors": "load it with transformers and "
    "CompressedTensorsConfig(run_compressed=False), and save_pretrained what that makes",
    "bitsandbytes": "load it with transformers, and save_pretrained what model.dequantize() makes",
    "MLX": "'mlx_lm.convert --dequantize' makes one on a Mac",
}

#: Files beside config.json that declare a format, and the table in them that does.
_BESIDE = {
    "hf_quant_config.json": "quantization",
    "quantize_config.json": None,
    "quant_config.json": None,
}

#: Formats by what only their tensors are called, and the types these have.
_BY_TENSORS = (
    ("NVFP4 (modelopt)", r"\.weight_scale_2$", None),
    ("compressed-tensors", r"\.weight_packed$", None),
    ("GPTQ or AWQ", r"\.qweight$", ("I32",)),
    ("bitsandbytes", r"\.(absmax|quant_map|SCB)$", None),
    ("MLX", r"\.weight$", ("U32",)),
)


def check_format(
    directory: Path | None, config: Mapping[str, Any], tensors: Iterable[TensorInfo] = ()
) -> None:
    """Refuse a checkpoint whose weights are published in a format that nothing here reads.

    Parameters
    ----------
    directory, config
        Where it lies (None is not here yet), and its ``config.json``.
    tensors
        What its weight files hold; looked at where nothing else declares a format.

    Raises
    ------
    UnsupportedModelError
        Naming the format, where it is declared, and what can be done.
    CheckpointError
        When a declaration is damaged.
    """
    for where, settings in _declared_in(directory, config):
        method = settings.get("quant_method")
        if method in SOURCES:
            return  # what transformers goes by, whatever is declared elsewhere
        name, details = _named(settings, mlx=where.endswith("quantization"))
        if name is None and not details:
            continue  # such as a cache of keys and values alone
        raise _unread(name, details, where)
    _check_tensors(tensors)


def _declared_in(
    directory: Path | None, config: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every table that declares a format, and where it is."""
    yield from _in_config(config)
    if directory is None:
        return
    for file, table in _BESIDE.items():
        path = directory / file
        if path.is_file():
            settings = read_object(path)
            inner = settings if table is None else settings.get(table)
            if isinstance(inner, dict):
                yield file, inner


def _in_config(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    texts = [config.get(name) for name in ("text_config", "llm_config", "language_config")]
    for table in (config, *(text for text in texts if isinstance(text, dict))):
        # MLX writes both, with the same content: its own says more.
        for name in ("quantization", "quantization_config", "compression_config"):
            settings = table.get(name)
            if settings is not None and not isinstance(settings, dict):
                raise CheckpointError(
                    f"{name} in config.json is {settings!r}, not a table of settings",
                    hint="compare with the publisher's own, complete config.json",
                )
            if settings:
                yield f"config.json's {name}", settings


def _named(settings: Mapping[str, Any], *, mlx: bool) -> tuple[str | None, str]:
    """Return what a table of settings calls its format, and what else there is to say of it."""
    method = settings.get("quant_method")
    algorithm = settings.get("quant_algo")
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("num_bits")
    for group in _tables(settings.get("config_groups")):
        weights = group.get("weights")
        bits = bits or (weights.get("num_bits") if isinstance(weights, dict) else None)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        bits = bits or (4 if settings.get("load_in_4bit") else 8)
    size = settings.get("group_size") or settings.get("q_group_size")
    about = [
        str(algorithm or settings.get("format") or ""),
        f"{bits} bits" if bits else "",
        f"groups of {size}" if size else "",
    ]
    details = ", ".join(part for part in about if part)
    if not method and algorithm:
        return str(algorithm), details.removeprefix(f"{algorithm}").removeprefix(", ")
    return (str(method) if method else "MLX" if mlx else None), details


def _tables(groups: Any) -> list[dict[str, Any]]:
    values = groups.values() if isinstance(groups, dict) else ()
    return [group for group in values if isinstance(group, dict)]


def _unread(name: str | None, details: str, where: str) -> UnsupportedModelError:
    called = (
        f"quantized with {name}" + (f" ({details})" if details else "")
        if name
        else f"quantized in a way that it does not name ({details})"
    )
    way = _WAYS.get(name or "")
    return UnsupportedModelError(
        f"the checkpoint is {called}, says {where}: it cannot be converted",
        hint=_ANOTHER + (f"; or {way}" if way else ""),
    )


def _check_tensors(tensors: Iterable[TensorInfo]) -> None:
    for info in tensors:
        for name, pattern, types in _BY_TENSORS:
            if re.search(pattern, info.key) and (types is None or info.stored in types):
                raise _unread(name, f"{info.key} is {info.stored}", info.path.name)
