"""f32: float32, exact. A unit is one input: 16 numbers, one a row."""

from __future__ import annotations

import numpy as np

from hybrid.formats.strips import F32, I64, TILE, U8, Format


def _pack(w: F32) -> U8:
    return np.ascontiguousarray(w.transpose(0, 2, 1)).view(np.uint8)


def _unpack(units: U8) -> F32:
    return units.view(np.float32).transpose(0, 2, 1)


def _unpack_rows(units: U8, rows: I64) -> F32:
    values: F32 = units.view(np.float32)[np.arange(len(rows)), :, rows]
    return values


def _repack(raw: U8) -> U8:
    return np.ascontiguousarray(raw.view(np.float32).transpose(0, 2, 1)).view(np.uint8)


FORMAT = Format(
    name="f32",
    unit_bytes=4 * TILE,
    unit_inputs=1,
    pack=_pack,
    unpack=_unpack,
    unpack_rows=_unpack_rows,
    repack=_repack,
    block_bytes=4,
    block_inputs=1,
    tensor="float32",
)
