"""Quantized matrices widened to float32, for products that are not made by our kernels."""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.checks import check_matrix
from cpu_experts.jit.compiled import kernel
from cpu_experts.jit.workers import LOCK
from hybrid.formats.errors import FormatError
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, GROUP, TILE, U8, pad

#: The formats that are widened here, and whether their codes have four bits.
WIDENED = {"q4_0": True, "q8_0": False}
#: What the bits of a half precision number mean.
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@kernel(parallel=True)
def _widen(codes, scales, halves, four_bits, inner, unit, out):
    """Rows of ``out``, whole strips of whole groups; ``codes`` and ``scales`` are one memory."""
    size = np.int64(GROUP // 2 if four_bits else GROUP) * TILE
    for s in prange(out.shape[0] // TILE):
        for g in range(inner):
            start = (s * inner + g) * unit
            for r in range(TILE):
                scale = halves[scales[(start + size) // 2 + r]]
                row, own = out[s * TILE + r, g * GROUP :], codes[start + 4 * r :]
                if four_bits:
                    for i in range(GROUP // 2):
                        code = own[i // 4 * 4 * TILE + i % 4]
                        row[i] = scale * np.float32(np.int32(code & 15) - 8)
                        row[GROUP // 2 + i] = scale * np.float32(np.int32(code >> 4) - 8)
                else:
                    for i in range(GROUP):
                        row[i] = scale * np.float32(np.int8(own[i // 4 * 4 * TILE + i % 4]))


def widen(packed: U8, rows: int, cols: int, fmt: str, out: F32) -> None:
    """Write what a packed matrix holds, exactly, on all threads.

    Parameters
    ----------
    packed
        uint8, ``[rows, cols]`` in one of :data:`WIDENED`.
    out
        ``[rows, cols]`` rounded up to whole strips and groups, float32, C-contiguous.

    Raises
    ------
    FormatError
        When ``packed`` is not what ``rows``, ``cols`` and ``fmt`` take, or not of these formats.
    ShapeError
        When ``out`` has another shape.
    """
    size, packing = packed_bytes(rows, cols, fmt), format_of(fmt)
    if fmt not in WIDENED or packed.dtype != np.uint8 or packed.shape != (size,):
        raise FormatError(
            f"packed {fmt} [{rows}, {cols}] takes uint8 [{size}] of {' or '.join(WIDENED)}, got"
            f" {packed.dtype} {list(packed.shape)}"
        )
    check_matrix("out", out, (pad(rows, TILE), pad(cols, GROUP)))
    inner, unit = packing.units(cols), packing.unit_bytes
    with LOCK:
        _widen(packed, packed.view(np.uint16), _HALVES, WIDENED[fmt], inner, unit, out)
