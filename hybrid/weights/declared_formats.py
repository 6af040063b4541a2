"""Tells in which format a checkpoint's weights were published, wherever it is declared.

Publishers say it in ``config.json``, in a file beside it, or only by the names and types of
their tensors. What cannot be read is refused by its right name, with a way that exists: there
may be no unquantized original. Loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.ask.published import CODED, DEQUANTIZED, method_of, not_read, tables_in, weights_of
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.weights.published import quantized
from hybrid.weights.source_files import TensorInfo, read_object

_READ = (
    "bf16, f16 or f32, fp8, mxfp8, mxfp4 or nvfp4, int4 of compressed-tensors, AWQ or GPTQ, or nf4"
)
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
    ("bitsandbytes", r"\.(absmax|quant_map|SCB)$|quant_state\.bitsandbytes__", None),
    ("HQQ", r"\.W_q$", None),
    ("MLX", r"\.weight$", ("U32",)),
)


def check_format(
    directory: Path | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None = None,
) -> None:
    """Refuse a checkpoint whose weights are published in a format that nothing here reads.

    Parameters
    ----------
    directory, config
        Where it lies (None is not here yet), and its ``config.json``.
    tensors
        What its weight files hold, where that is known.

    Raises
    ------
    UnsupportedModelError
        Naming the format, where it is declared, and what can be done.
    CheckpointError
        When a declaration is damaged, or the weights are not what it says.
    """
    declared = _declared(directory, config)
    if declared is None:
        _check_tensors(tensors or {}, named=False)
        return
    where, settings = declared
    method = settings.get("quant_method")
    if method in DEQUANTIZED:
        return  # what transformers goes by, whatever is declared elsewhere
    name, details = _named(settings, mlx=where.endswith("quantization"))
    known = method_of(settings) in CODED
    if known and (odd := not_read(settings)) is not None:
        raise _unread(name, details, where, odd)
    if not known and (name is not None or tensors is not None):
        if name is None and tensors and any(True for _ in quantized(tensors)):
            return  # its tensors say what it does not
        raise _unread(name, details, where)
    if known and tensors is not None:
        _check_tensors(tensors, named=True)
        if not any(True for _ in quantized(tensors)):
            raise CheckpointError(
                f"{_called(name, details)}, says {where}: its weight files hold no such tensors",
                hint="config.json and the weights are not of one model: download both again",
            )


def settings_of(directory: Path | None, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the settings of a checkpoint's quantization; None where none are declared.

    Raises
    ------
    CheckpointError
        When they are damaged.
    """
    declared = _declared(directory, config)
    return None if declared is None else declared[1]


def is_coded(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's settings say that its weights are in codes that are read here."""
    settings = settings_of(directory, config)
    return settings is not None and settings.get("quant_method") not in DEQUANTIZED


def _declared(
    directory: Path | None, config: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]] | None:
    """Return the first table that declares a format of weights, and where it is."""
    for where, settings in _declared_in(directory, config):
        name, details = _named(settings, mlx=where.endswith("quantization"))
        if name is not None or details:  # else such as a cache of keys and values alone
            return where, settings
    return None


def _declared_in(
    directory: Path | None, config: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every table that declares a format, and where it is."""
    yield from tables_in(config)
    if directory is None:
        return
    for file, table in _BESIDE.items():
        path = directory / file
        if path.is_file():
            settings = read_object(path)
            inner = settings if table is None else settings.get(table)
            if isinstance(inner, dict):
                yield file, inner


def _named(settings: Mapping[str, Any], *, mlx: bool) -> tuple[str | None, str]:
    """Return what a table of settings calls its format, and what else there is to say of it."""
    method = settings.get("quant_method")
    algorithm = settings.get("quant_algo")
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("num_bits")
    for weights in weights_of(settings):
        bits = bits or weights.get("num_bits")
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


def _called(name: str | None, details: str) -> str:
    if name is None:
        return f"the checkpoint is quantized in a way that it does not name ({details})"
    return f"the checkpoint is quantized with {name}" + (f" ({details})" if details else "")


def _unread(name: str | None, details: str, where: str, odd: str = "") -> UnsupportedModelError:
    way = _WAYS.get(name or "")
    what = f"{odd} cannot be read" if odd and odd not in details else "it cannot be converted"
    return UnsupportedModelError(
        f"{_called(name, details)}, says {where}: {what}",
        hint=_ANOTHER + (f"; or {way}" if way else ""),
    )


def _check_tensors(tensors: Mapping[str, TensorInfo], *, named: bool) -> None:
    """Refuse tensors of a format that are no whole matrix of it; GPTQ's, where nobody names it."""
    taken = set()
    for _, path, parts in quantized(tensors):
        if "qweight" in parts and not named and _is_gptq(parts):
            continue  # nothing says how its codes of zero are meant
        taken |= {f"{path}.{part}" for part in parts}
    for key, info in tensors.items():
        if key in taken:
            continue
        for name, pattern, types in _BY_TENSORS:
            if re.search(pattern, key) and (types is None or info.stored in types):
                raise _unread(name, f"{key} is {info.stored}", info.path.name)


def _is_gptq(parts: Mapping[str, TensorInfo]) -> bool:
    return parts["qweight"].shape[-1:] == parts["scales"].shape[-1:]
