"""bf16: bfloat16, not quantized. A unit is one input: 16 numbers, one a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.strips import F32, I64, TILE, U8, Format


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, halves to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    """Widen bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack(w: F32) -> U8:
    return np.ascontiguousarray(to_bf16(w).transpose(0, 2, 1)).view(np.uint8)


def _unpack(units: U8) -> F32:
    return from_bf16(np.ascontiguousarray(units.view(np.uint16).transpose(0, 2, 1)))


def _unpack_rows(units: U8, rows: I64) -> F32:
    return from_bf16(units.view(np.uint16)[np.arange(len(rows)), :, rows])


def _repack(raw: U8) -> U8:
    return np.ascontiguousarray(raw.view(np.uint16).transpose(0, 2, 1)).view(np.uint8)


FORMAT = Format(
    name="bf16",
    unit_bytes=2 * TILE,
    unit_inputs=1,
    pack=_pack,
    unpack=_unpack,
    unpack_rows=_unpack_rows,
    repack=_repack,
    block_bytes=2,
    block_inputs=1,
    dense=True,
    tensor="bfloat16",
)
