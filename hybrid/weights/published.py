"""The quantized matrices of a checkpoint directory, found by their tensors, whoever made them.

A matrix is one tensor for the model, ``<path>.weight``, and several in the files. Whole codes and
floats of 4 bits are read as elements (:mod:`hybrid.formats.elements`), floats of 8 bits as numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hybrid.ask.published import Convention
from hybrid.errors import CheckpointError
from hybrid.weights.published_floats import Floats4, Floats8, Normal
from hybrid.weights.published_matrix import CHECK, Files, Matrix, Parts
from hybrid.weights.published_whole import Awq, Bytes, Gptq, Packed
from hybrid.weights.source_files import TensorInfo

_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"

#: What tensors of sizes or contents that cannot be make of the code that reads them.
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError)


#: What the tensors of a matrix are called, by how one is known: its own name, with its types, and
#: those beside it that it has to have and may have.
@dataclass(frozen=True)
class _Kind:
    first: str
    types: tuple[str, ...]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


_PACKED = _Kind(
    "weight_packed",
    ("I32",),
    ("weight_scale", "weight_shape"),
    ("weight_zero_point", "weight_g_idx"),
)
_WORDS = _Kind("qweight", ("I32",), ("qzeros", "scales"), ("g_idx",))
_CT_FP4 = _Kind("weight_packed", ("U8",), ("weight_scale",), ("weight_global_scale",))
_NVFP4 = _Kind("weight", ("U8",), ("weight_scale", "weight_scale_2"))
_FP8 = _Kind("weight", ("F8_E4M3", "F8_E5M2"), ("weight_scale",))
_INT8 = _Kind("weight", ("I8",), ("weight_scale",), ("weight_zero_point",))
_NF4 = _Kind(
    "weight",
    ("U8",),
    ("weight.absmax", "weight.quant_map", _NF4_STATE),
    ("weight.nested_absmax", "weight.nested_quant_map"),
)
_KINDS = (_PACKED, _WORDS, _CT_FP4, _NVFP4, _FP8, _INT8, _NF4)
_FIRST = re.compile(r"(.+)\.(weight|weight_packed|qweight)")


def quantized(
    tensors: Mapping[str, TensorInfo],
) -> Iterator[tuple[_Kind, str, dict[str, TensorInfo]]]:
    """Yield the quantized matrices among tensors: their kind, their module's path, their parts."""
    for key, info in tensors.items():
        match = _FIRST.fullmatch(key)
        if match is None or info.stored in ("BF16", "F16", "F32", "F64"):
            continue
        path, name = match[1], match[2]
        for kind in _KINDS:
            if name == kind.first and info.stored in kind.types:
                parts = {
                    part: tensors[f"{path}.{part}"]
                    for part in (name, *kind.needs, *kind.may)
                    if f"{path}.{part}" in tensors
                }
                if all(part in parts for part in kind.needs):
                    yield kind, path, parts
                    break


def matrices(
    tensors: Mapping[str, TensorInfo], files: Files, convention: Convention
) -> dict[str, Matrix]:
    """Return the quantized matrices among tensors, by the keys that a model knows them by.

    Raises
    ------
    CheckpointError
        When their sizes do not fit together.
    """
    found = {}
    for kind, path, parts in quantized(tensors):
        try:
            matrix = _made(kind, path, parts, files, convention)
        except _DAMAGE as error:
            sizes = ", ".join(f"{name} {list(info.shape)}" for name, info in parts.items())
            raise CheckpointError(
                f"{path}: its tensors make no matrix ({sizes}; {type(error).__name__}: {error})",
                hint=CHECK,
            ) from error
        found[matrix.key] = matrix
    return found


def _made(kind: _Kind, path: str, parts: Parts, files: Files, convention: Convention) -> Matrix:
    plain: dict[_Kind, Callable[..., Matrix]] = {_CT_FP4: Floats4, _NVFP4: Floats4, _INT8: Bytes}
    if kind is _PACKED:
        rows, cols = files.whole(parts["weight_shape"]).reshape(-1)
        return Packed(path, parts, (int(rows), int(cols)))
    if kind is _WORDS:
        by_row = parts["qweight"].shape[-1] == parts["scales"].shape[-1]
        return Gptq(path, parts, convention) if by_row else Awq(path, parts)
    if kind is _FP8:
        return Floats8(path, parts, convention)
    if kind is _NF4:
        state = json.loads(files.whole(parts[_NF4_STATE]).tobytes())
        rows, cols = state["shape"]
        return Normal(path, parts, (int(rows), int(cols)), state)
    return plain[kind](path, parts)
