"""Quantized matrices widened to float32, for products that are not made by our kernels."""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.compiled import kernel
from cpu_experts.errors import FormatError
from cpu_experts.ffn import LOCK, check_matrix
from cpu_experts.formats import F32, GROUP, TILE, U8, is_quantized, packed_bytes, pad, strip_bytes

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
                row = out[s * TILE + r, g * GROUP :]
                for chunk in range(size // (4 * TILE)):
                    at = start + (chunk * TILE + r) * 4
                    for k in range(4):
                        if four_bits:
                            low, high = codes[at + k] & 15, codes[at + k] >> 4
                            row[chunk * 4 + k] = scale * (np.int32(low) - 8)
                            row[16 + chunk * 4 + k] = scale * (np.int32(high) - 8)
                        else:
                            row[chunk * 4 + k] = scale * np.int8(codes[at + k])


def widen(packed: U8, rows: int, cols: int, fmt: str, out: F32) -> None:
    """Write what a packed matrix holds, exactly, on all threads.

    Parameters
    ----------
    packed
        uint8, ``[rows, cols]`` in ``q4_0`` or ``q8_0``.
    out
        ``[rows, cols]`` rounded up to whole strips and groups, float32, C-contiguous.

    Raises
    ------
    FormatError
        When ``packed`` is not what ``rows``, ``cols`` and ``fmt`` take, or not quantized.
    ShapeError
        When ``out`` has another shape.
    """
    size = packed_bytes(rows, cols, fmt)
    if not is_quantized(fmt) or packed.dtype != np.uint8 or packed.shape != (size,):
        raise FormatError(
            f"packed {fmt} [{rows}, {cols}] takes uint8 [{size}] of a quantized format, got"
            f" {packed.dtype} {list(packed.shape)}"
        )
    check_matrix("out", out, (pad(rows, TILE), pad(cols, GROUP)))
    inner = pad(cols, GROUP) // GROUP
    unit = strip_bytes(cols, fmt) // inner
    with LOCK:
        _widen(packed, packed.view(np.uint16), _HALVES, fmt == "q4_0", inner, unit, out)
