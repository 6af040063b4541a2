"""The quantized matrices of a checkpoint directory, found by their tensors, whoever made them.

A matrix is one tensor for the model, ``<path>.weight``, and several in the files. Whole codes and
floats of 4 bits are read as elements (:mod:`hybrid.formats.elements`), floats of 8 bits as numbers.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.ask.published import LARGER, SMALLER, Convention, format_of_whole
from hybrid.errors import CheckpointError
from hybrid.formats.elements import (
    MXFP4,
    NORMAL,
    NVFP4,
    WHOLE,
    Elements,
    elements,
    numbers_of,
)
from hybrid.formats.strips import F32, SUPER, U8
from hybrid.weights.source_files import TensorInfo

_CHECK = "the files are not what their settings say: compare with the publisher's own"
#: Where AWQ has the columns of a word, from its low bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"

#: What tensors of sizes or contents that cannot be make of the code that reads them.
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError)

Numbers = NDArray[Any]
Parts = Mapping[str, TensorInfo]


class Files(Protocol):
    """Reads tensors, as numpy has them: floats of 16 and 8 bits are widened or bytes."""

    def rows(self, info: TensorInfo, start: int, stop: int) -> Numbers:
        """Rows ``start:stop`` of a tensor."""

    def whole(self, info: TensorInfo) -> Numbers:
        """All of a tensor; the last ones are kept."""


class Matrix(ABC):
    """A quantized matrix ``[rows, cols]``.

    Parameters
    ----------
    path
        Of its module.
    parts
        Its tensors, by what their names have behind the module's.
    """

    #: Whether it is read as elements.
    coded = True

    def __init__(self, path: str, parts: Parts) -> None:
        self.path, self.parts = path, parts
        self.key = f"{path}.weight"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @abstractmethod
    def format(self, files: Files) -> str | None:
        """The format of ours that is nearest; None of floats."""

    @abstractmethod
    def read(self, files: Files, start: int, stop: int) -> Any:
        """Rows ``start:stop``, as elements or in float32."""

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(info.nbytes for info in self.parts.values())

    def floats(self, files: Files, start: int, stop: int) -> F32:
        """Rows ``start:stop`` in float32."""
        found: F32 = self.read(files, start, stop)
        return numbers_of(found) if self.coded else found

    def _wrong(self, what: str) -> CheckpointError:
        sizes = ", ".join(f"{name} {list(info.shape)}" for name, info in self.parts.items())
        return CheckpointError(f"{self.path}: {what} ({sizes})", hint=_CHECK)


class Whole(Matrix):
    """Whole codes less a code of zero, times a scale of a group of inputs."""

    bits: int
    #: Groups of a row.
    groups: int
    symmetric = False

    @cached_property
    def size(self) -> int:
        """Inputs of a group."""
        cols = self.shape[1]
        if self.groups < 1 or cols % self.groups:
            raise self._wrong(f"{cols} columns are not whole groups of {self.groups}")
        return cols // self.groups

    def format(self, files: Files) -> str | None:
        if self._order(files) is not None:
            return SMALLER if self.bits == 4 else LARGER
        one = self.groups == 1 and self.size > SUPER
        return format_of_whole(self.bits, None if one else self.size, symmetric=self.symmetric)

    def read(self, files: Files, start: int, stop: int) -> Elements:
        codes, scales = self._codes(files, start, stop), self._scales(files, start, stop)
        zeros, order = self._zeros(files, start, stop), self._order(files)
        found = elements(codes.shape, WHOLE)
        if order is not None:
            zeros = zeros if np.ndim(zeros) == 0 else zeros[:, order]
            found["number"], found["scale"] = codes - zeros, scales[:, order]
            return found
        grouped = found.reshape(len(codes), self.groups, self.size)
        zeros = zeros if np.ndim(zeros) == 0 else zeros[..., None]
        grouped["number"] = codes.reshape(grouped.shape) - zeros
        grouped["scale"] = scales[..., None]
        return found

    def _order(self, files: Files) -> Numbers | None:
        """The group of each column; None where they follow one another."""
        info = self.parts.get("g_idx") or self.parts.get("weight_g_idx")
        if info is None:
            return None
        order = files.whole(info).reshape(-1)
        if len(order) != self.shape[1] or order.min() < 0 or order.max() >= self.groups:
            raise self._wrong(f"groups {order.min()} to {order.max()} of {self.groups}")
        return None if np.array_equal(order, np.arange(len(order)) // self.size) else order

    @abstractmethod
    def _codes(self, files: Files, start: int, stop: int) -> Numbers:
        """Codes ``[n, cols]`` without a sign, int16."""

    @abstractmethod
    def _scales(self, files: Files, start: int, stop: int) -> F32:
        """Scales ``[n, groups]``."""

    @abstractmethod
    def _zeros(self, files: Files, start: int, stop: int) -> Any:
        """Codes of zero ``[n, groups]``, or one for all."""


class Packed(Whole):
    """compressed-tensors' pack-quantized: codes of a row in words, the lowest bits first."""

    def __init__(self, path: str, parts: Parts, shape: tuple[int, int]) -> None:
        super().__init__(path, parts)
        self._shape = shape
        words = parts["weight_packed"].shape
        self.bits = next((b for b in (4, 8) if words[-1] == -(-shape[1] * b // 32)), 0)
        scales = parts["weight_scale"].shape
        self.groups = scales[1] if len(scales) == 2 else 1
        self.symmetric = "weight_zero_point" not in parts
        if not self.bits or words[0] != shape[0] or scales[0] not in (1, shape[0]):
            raise self._wrong(f"no codes of 4 or 8 bits make {list(shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def _codes(self, files: Files, start: int, stop: int) -> Numbers:
        words = files.rows(self.parts["weight_packed"], start, stop)
        return _unpacked(words, self.bits)[:, : self._shape[1]]

    def _scales(self, files: Files, start: int, stop: int) -> F32:
        return _per_row(files, self.parts["weight_scale"], start, stop, self.shape[0])

    def _zeros(self, files: Files, start: int, stop: int) -> Any:
        if self.symmetric:
            return np.int16(2 ** (self.bits - 1))
        words = files.whole(self.parts["weight_zero_point"])
        per = 32 // self.bits
        some = words[start // per : -(-stop // per)]
        zeros = _unpacked(np.ascontiguousarray(some.T), self.bits).T
        return zeros[start % per :][: stop - start]


class Gptq(Whole):
    """GPTQ: words of neighbouring inputs, rows side by side, codes of zero in words of rows."""

    def __init__(self, path: str, parts: Parts, convention: Convention) -> None:
        super().__init__(path, parts)
        self._convention = convention
        self.symmetric = convention.symmetric
        words, scales = parts["qweight"].shape, parts["scales"].shape
        zeros = parts["qzeros"].shape
        self.groups, self._rows = scales
        self.bits = next((b for b in (4, 8) if zeros[1] == -(-self._rows * b // 32)), 0)
        if not self.bits or words[1] != self._rows or zeros[0] != self.groups:
            raise self._wrong("no codes of 4 or 8 bits have these sizes")

    @property
    def shape(self) -> tuple[int, int]:
        return self._rows, self.parts["qweight"].shape[0] * 32 // self.bits

    def _codes(self, files: Files, start: int, stop: int) -> Numbers:
        words = files.whole(self.parts["qweight"])[:, start:stop]
        return _unpacked(np.ascontiguousarray(words.T), self.bits)

    def _scales(self, files: Files, start: int, stop: int) -> F32:
        return files.whole(self.parts["scales"])[:, start:stop].T

    def _zeros(self, files: Files, start: int, stop: int) -> Any:
        words = files.whole(self.parts["qzeros"]).view(np.uint32)
        if self._convention.zeros_less_one:  # of whole words, as they were subtracted
            words = words + np.uint32(0x11111111 if self.bits == 4 else 0x01010101)
        return _unpacked(words, self.bits)[:, start:stop].T


class Awq(Whole):
    """AWQ's gemm layout: words of eight rows in an order of their own, inputs one by one."""

    bits = 4

    def __init__(self, path: str, parts: Parts) -> None:
        super().__init__(path, parts)
        words, self._scale_shape = parts["qweight"].shape, parts["scales"].shape
        self.groups = self._scale_shape[0]
        if words[1] * 8 != self._scale_shape[1] or parts["qzeros"].shape != (self.groups, words[1]):
            raise self._wrong("no codes of 4 bits have these sizes")

    @property
    def shape(self) -> tuple[int, int]:
        return self._scale_shape[1], self.parts["qweight"].shape[0]

    def _codes(self, files: Files, start: int, stop: int) -> Numbers:
        return self._rows_of(files, "qweight", start, stop)

    def _scales(self, files: Files, start: int, stop: int) -> F32:
        return files.whole(self.parts["scales"])[:, start:stop].T

    def _zeros(self, files: Files, start: int, stop: int) -> Any:
        return self._rows_of(files, "qzeros", start, stop)

    def _rows_of(self, files: Files, name: str, start: int, stop: int) -> Numbers:
        words = files.whole(self.parts[name])[:, start // 8 : -(-stop // 8)]
        codes = _unpacked(np.ascontiguousarray(words), 4).reshape(len(words), -1, 8)
        ordered = np.empty_like(codes)
        ordered[..., list(_AWQ_ORDER)] = codes
        rows = ordered.reshape(len(words), -1).T[start % 8 :]
        return rows[: stop - start]


class Bytes(Whole):
    """compressed-tensors' int-quantized: a byte with a sign each, a scale of the row or a group."""

    bits = 8

    def __init__(self, path: str, parts: Parts) -> None:
        super().__init__(path, parts)
        scales = parts["weight_scale"].shape
        self.groups = scales[1] if len(scales) == 2 else 1
        self.symmetric = "weight_zero_point" not in parts

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.parts["weight"].shape
        return rows, cols

    def _codes(self, files: Files, start: int, stop: int) -> Numbers:
        return files.rows(self.parts["weight"], start, stop).astype(np.int16)

    def _scales(self, files: Files, start: int, stop: int) -> F32:
        return _per_row(files, self.parts["weight_scale"], start, stop, self.shape[0])

    def _zeros(self, files: Files, start: int, stop: int) -> Any:
        if self.symmetric:
            return np.int16(0)
        zeros = _per_row(files, self.parts["weight_zero_point"], start, stop, self.shape[0])
        return zeros.astype(np.int16)


class Floats4(Matrix):
    """Floats of 4 bits: NVFP4 of ModelOpt and compressed-tensors, and the latter's MXFP4."""

    def __init__(self, path: str, parts: Parts) -> None:
        super().__init__(path, parts)
        self._codes = parts.get("weight_packed") or parts["weight"]
        self._kind = MXFP4 if parts["weight_scale"].stored in ("U8", "F8_E8M0") else NVFP4
        rows, cols = self.shape
        if parts["weight_scale"].shape != (rows, cols // self._size) or cols % self._size:
            raise self._wrong(f"floats of 4 bits have a scale for every {self._size}")

    @property
    def _size(self) -> int:
        return 32 if self._kind == MXFP4 else 16

    @property
    def shape(self) -> tuple[int, int]:
        rows, halves = self._codes.shape
        return rows, 2 * halves

    def format(self, files: Files) -> str | None:
        return "mxfp4" if self._kind == MXFP4 else "nvfp4"

    def read(self, files: Files, start: int, stop: int) -> Elements:
        codes = _nibbles(files.rows(self._codes, start, stop).view(np.uint8))
        found = elements(codes.shape, self._kind)
        found["number"] = codes
        scales = files.rows(self.parts["weight_scale"], start, stop).view(np.uint8)
        found.reshape(len(codes), -1, self._size)["sub"] = scales[..., None]
        found["scale"] = self._factor(files)
        return found

    def _factor(self, files: Files) -> np.float32:
        if (info := self.parts.get("weight_scale_2")) is not None:
            return np.float32(files.whole(info).reshape(-1)[0])
        if (info := self.parts.get("weight_global_scale")) is not None:
            return np.float32(1) / np.float32(files.whole(info).reshape(-1)[0])
        return np.float32(1)


class Floats8(Matrix):
    """Floats of 8 bits with a scale of the matrix, of the row or of a block."""

    coded = False

    def __init__(self, path: str, parts: Parts, convention: Convention) -> None:
        super().__init__(path, parts)
        self._convention = convention

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.parts["weight"].shape
        return rows, cols

    def format(self, files: Files) -> str | None:
        return None

    def read(self, files: Files, start: int, stop: int) -> F32:
        values: F32 = files.rows(self.parts["weight"], start, stop)
        scales = files.whole(self.parts["weight_scale"])
        sizes = [size for size in scales.shape if size != 1]
        rows, cols = self.shape
        if not sizes:
            return values * scales.reshape(())
        if sizes == [rows] and (scales.ndim < 2 or scales.shape[0] == rows):
            return values * scales.reshape(-1, 1)[start:stop]
        grid = scales.reshape(scales.shape[0], -1) if scales.ndim < 3 else scales.squeeze()
        grid = grid.reshape(grid.shape[0], -1)
        stated = self._convention.blocks or (128, 128)
        high, wide = (
            block if -(-size // block) == count else -(-size // count)
            for size, count, block in zip((rows, cols), grid.shape, stated, strict=True)
        )
        down, across = np.arange(start, stop) // high, np.arange(cols) // wide
        return values * grid[down][:, across]


class Normal(Matrix):
    """bitsandbytes' nf4: codes of the whole matrix in one run, in blocks with a largest value."""

    def __init__(
        self, path: str, parts: Parts, shape: tuple[int, int], state: Mapping[str, Any]
    ) -> None:
        super().__init__(path, parts)
        self._shape, self._state = shape, state
        self._block = int(state.get("blocksize") or 64)
        rows, cols = shape
        if parts["weight"].nbytes * 2 != rows * cols:
            raise self._wrong(f"codes of 4 bits do not make {list(shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def format(self, files: Files) -> str | None:
        return "nf4" if self._block == 64 and self._shape[1] % 64 == 0 else SMALLER

    def read(self, files: Files, start: int, stop: int) -> Elements:
        cols = self._shape[1]
        first, last = start * cols, stop * cols
        raw = files.whole(self.parts["weight"]).reshape(-1)[first // 2 : -(-last // 2)]
        codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        found = elements((stop - start, cols), NORMAL)
        found["number"] = codes.reshape(found.shape)
        of_blocks = self._largest(files)
        found["scale"] = of_blocks[np.arange(first, last) // self._block].reshape(found.shape)
        return found

    def _largest(self, files: Files) -> F32:
        """The largest values of the blocks, which may be quantized themselves."""
        kept = files.whole(self.parts["weight.absmax"]).reshape(-1)
        nested = self.parts.get("weight.nested_absmax")
        if nested is None:
            return kept.astype(np.float32)
        table = files.whole(self.parts["weight.nested_quant_map"]).reshape(-1)
        outer = files.whole(nested).reshape(-1)
        size = int(self._state.get("nested_blocksize") or 256)
        scales = np.repeat(outer, size)[: len(kept)]
        found: F32 = table[kept] * scales + np.float32(self._state.get("nested_offset") or 0)
        return found


def _unpacked(words: Numbers, bits: int) -> Numbers:
    """Codes of 4 or 8 bits of contiguous words ``[n, W]``, the lowest first, int16."""
    raw = words.view(np.uint8)
    return (_nibbles(raw) if bits == 4 else raw).astype(np.int16)


def _nibbles(raw: U8) -> U8:
    """Codes of 4 bits ``[n, 2 * bytes]``, the low ones first."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)


def _per_row(files: Files, info: TensorInfo, start: int, stop: int, rows: int) -> Numbers:
    """Rows of scales ``[rows, groups]``, which may be one for all."""
    found = files.whole(info)
    if found.size == 1:
        return np.broadcast_to(found.reshape(1, 1), (stop - start, 1))
    return found.reshape(rows, -1)[start:stop]


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
                hint=_CHECK,
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
