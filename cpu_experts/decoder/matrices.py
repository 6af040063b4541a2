"""Matrices and norms of a decoder as values and arrays, and how they become records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpu_experts.checks import check_floats, check_packed
from cpu_experts.kernels.dots import dot_table
from cpu_experts.kernels.records import address
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, U8

#: Bytes of weights that the least share of a product has, about.
_SHARE_BYTES = 32768


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix ``[rows, cols]`` packed as ``format``, with an optional bias ``[rows]``."""

    weight: U8
    rows: int
    cols: int
    format: str
    bias: F32 | None = None

    def __post_init__(self) -> None:
        size = packed_bytes(self.rows, self.cols, self.format)
        check_packed(self.weight, self.rows, self.cols, self.format, size)
        check_floats("bias", self.bias, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.weight.size

    def record(self, threads: int) -> dict[str, Any]:
        """Values of :data:`~cpu_experts.decoder.records.MATRIX`."""
        packing = format_of(self.format)
        strip = packing.strip_bytes(self.cols)
        return {
            "at": address(self.weight),
            "bias": address(self.bias),
            "rows": self.rows,
            "cols": self.cols,
            "format": dot_table(self.format),
            "strip_bytes": strip,
            "inner": packing.units(self.cols),
            "strips": max(1, _SHARE_BYTES // strip),
            "threads": threads,
        }


@dataclass(frozen=True, kw_only=True)
class Norm:
    """``(x - mean) / sqrt(mean of squares + eps) * weight + bias``; mean only if centered."""

    weight: F32
    eps: float
    bias: F32 | None = None
    centered: bool = False

    def __post_init__(self) -> None:
        check_floats("norm weight", self.weight, self.weight.size)
        check_floats("norm bias", self.bias, self.weight.size)

    def record(self) -> dict[str, Any]:
        """Values of :data:`~cpu_experts.decoder.records.NORM`."""
        return {
            "weight": address(self.weight),
            "bias": address(self.bias),
            "size": self.weight.size,
            "centered": self.centered,
            "eps": self.eps,
        }
