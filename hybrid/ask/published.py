"""What the settings of a quantized checkpoint say: how its weights were quantized, and by whom.

Loads neither torch nor transformers, and reads nothing but the tables that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.errors import CheckpointError

#: ``quant_method`` of the checkpoints that transformers' own code dequantizes.
DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")
#: Those whose codes are read here.
CODED = ("compressed-tensors", "awq", "gptq", "modelopt", "bitsandbytes", "fbgemm_fp8")

_CT_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
_MODELOPT = (
    *("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"),
    "MIXED_PRECISION",
)
#: Where the settings of a text model lie in those of a larger one.
_TEXTS = ("text_config", "llm_config", "language_config")
#: What weights are quantized anew to where no format of ours has their groups.
SMALLER, LARGER = "q4_k", "q8_0"


def tables_in(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every table of a config.json that declares a format, and where it is.

    Raises
    ------
    CheckpointError
        When one is no table.
    """
    texts = [config.get(name) for name in _TEXTS]
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


def method_of(settings: Mapping[str, Any]) -> str | None:
    """Return the ``quant_method`` of a table of settings; that of ModelOpt by its algorithm."""
    method = settings.get("quant_method")
    if method is None and settings.get("quant_algo"):
        return "modelopt"
    return str(method) if method else None


def weights_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tables of how weights are quantized, of compressed-tensors' groups."""
    groups = settings.get("config_groups")
    tables = groups.values() if isinstance(groups, dict) else ()
    found = [table.get("weights") for table in tables if isinstance(table, dict)]
    return [table for table in found if isinstance(table, dict)]


def not_read(settings: Mapping[str, Any]) -> str | None:
    """Return what of these settings nothing here reads; None where all can be read."""
    method, algorithm = method_of(settings), settings.get("quant_algo")
    bits = settings.get("bits") or settings.get("w_bit")
    if method == "awq":
        version = str(settings.get("version") or "gemm").lower()
        return f"version {version}" if version != "gemm" else _odd_bits(bits, (4,))
    if method == "gptq":
        layout = settings.get("checkpoint_format") or "gptq"
        return f"{layout}" if layout not in ("gptq", "gptq_v2") else _odd_bits(bits, (4, 8))
    if method == "modelopt" and algorithm is not None and algorithm not in _MODELOPT:
        return str(algorithm)
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return "8 bits"
    if method == "compressed-tensors":
        return _not_read_of_tensors(settings)
    return None


def _odd_bits(bits: Any, known: tuple[int, ...]) -> str | None:
    return None if bits is None or bits in known else f"{bits} bits"


def _not_read_of_tensors(settings: Mapping[str, Any]) -> str | None:
    sparsity, transforms = settings.get("sparsity_config"), settings.get("transform_config")
    groups = settings.get("config_groups")
    tables = groups.values() if isinstance(groups, dict) else ()
    formats = [settings.get("format"), *(t.get("format") for t in tables if isinstance(t, dict))]
    for name in formats:
        if name is not None and name not in _CT_FORMATS:
            return str(name)
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        return f"sparse, {sparsity['format']}"
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "turned weights"
    odd = (_odd_bits(weights.get("num_bits"), (4, 8)) for weights in weights_of(settings))
    return next((what for what in odd if what is not None), None)


@dataclass(frozen=True)
class Convention:
    """What tensors do not say of themselves.

    Attributes
    ----------
    zeros_less_one
        Whether codes of zero are stored less one, as GPTQ's first layout has them.
    symmetric
        Whether all codes of zero are the middle one.
    blocks
        Rows and columns that share a scale of 8-bit floats; None is what the sizes say.
    """

    zeros_less_one: bool = True
    symmetric: bool = False
    blocks: tuple[int, int] | None = None


def convention(settings: Mapping[str, Any] | None) -> Convention:
    """Return the conventions that settings ask for; those of most files without any."""
    settings = settings or {}
    shapes = (weights.get("block_structure") for weights in weights_of(settings))
    blocks = next((shape for shape in shapes if isinstance(shape, list) and len(shape) == 2), None)
    return Convention(
        zeros_less_one=settings.get("checkpoint_format") != "gptq_v2",
        symmetric=bool(settings.get("sym")),
        blocks=(int(blocks[0]), int(blocks[1])) if blocks else None,
    )


def format_of_whole(bits: int, size: int | None, *, symmetric: bool) -> str:
    """Return the format of ours that whole codes are kept in.

    Parameters
    ----------
    size
        Inputs that share a scale; None where a row has one.
    """
    if bits == 8:
        return LARGER
    if size is None or size % 256 == 0:
        return "int4_256"
    if size == 32 and symmetric:
        return "q4_0"
    return f"int4_{size}" if size in (32, 64, 128) else SMALLER


def kept_as(settings: Mapping[str, Any], module: str) -> str | None:
    """Return the format that a module's weights are kept in; None where they are no codes.

    From the settings alone: a checkpoint's own tensors may say more.
    """
    method = method_of(settings)
    if method not in CODED or not_read(settings) or left_plain(settings, module):
        return None
    if method == "bitsandbytes":
        return "nf4"
    if method == "modelopt":
        return "nvfp4" if "NVFP4" in str(settings.get("quant_algo")) else None
    if method in ("awq", "gptq"):
        if settings.get("desc_act") and not settings.get("static_groups"):
            return SMALLER if settings.get("bits", 4) == 4 else LARGER
        size = settings.get("group_size") or settings.get("q_group_size")
        symmetric = method == "gptq" and bool(settings.get("sym"))
        return format_of_whole(settings.get("bits") or 4, _size(size), symmetric=symmetric)
    return next((_format_of_weights(w) for w in weights_of(settings)), None)


def _format_of_weights(weights: Mapping[str, Any]) -> str | None:
    bits, size = weights.get("num_bits"), _size(weights.get("group_size"))
    if weights.get("type") == "float":
        return {16: "nvfp4", 32: "mxfp4"}.get(size or 0) if bits == 4 else None
    if weights.get("actorder") in ("group", True):
        return SMALLER if bits == 4 else LARGER
    return format_of_whole(bits or 4, size, symmetric=weights.get("symmetric") is not False)


def _size(size: Any) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


def left_plain(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a module's weights were not quantized, by the lists of its settings."""
    for name in ("ignore", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules"):
        listed = settings.get(name)
        for pattern in listed if isinstance(listed, list) else ():
            if isinstance(pattern, str) and _matches(pattern, module):
                return True
    return False


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    if "*" in pattern:
        parts = (re.escape(part) for part in pattern.split("*"))
        return re.fullmatch(".*".join(parts), module) is not None
    return module == pattern or f".{pattern}." in f".{module}."
