"""Quantized matrices of whole codes: compressed-tensors, GPTQ and AWQ."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np

from hybrid.ask.published import LARGER, SMALLER, Convention, format_of_whole
from hybrid.formats.elements import WHOLE, Elements, elements
from hybrid.formats.strips import F32, SUPER
from hybrid.weights.published_matrix import Files, Matrix, Numbers, Parts, nibbles
from hybrid.weights.source_files import TensorInfo

#: Where AWQ has the columns of a word, from its low bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
            raise self.wrong(f"{cols} columns are not whole groups of {self.groups}")
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
            raise self.wrong(f"groups {order.min()} to {order.max()} of {self.groups}")
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
            raise self.wrong(f"no codes of 4 or 8 bits make {list(shape)}")

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
            raise self.wrong("no codes of 4 or 8 bits have these sizes")

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
            raise self.wrong("no codes of 4 bits have these sizes")

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


def _unpacked(words: Numbers, bits: int) -> Numbers:
    """Codes of 4 or 8 bits of contiguous words ``[n, W]``, the lowest first, int16."""
    raw = words.view(np.uint8)
    return (nibbles(raw) if bits == 4 else raw).astype(np.int16)


def _per_row(files: Files, info: TensorInfo, start: int, stop: int, rows: int) -> Numbers:
    """Rows of scales ``[rows, groups]``, which may be one for all."""
    found = files.whole(info)
    if found.size == 1:
        return np.broadcast_to(found.reshape(1, 1), (stop - start, 1))
    return found.reshape(rows, -1)[start:stop]
