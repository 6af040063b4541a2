"""Quantized matrices widened to float32, for products that are not made by our kernels."""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.errors import FormatError
from cpu_experts.ffn import LOCK, check_matrix
from cpu_experts.formats import F32, GROUP, TILE, U8, is_quantized, packed_bytes, pad, strip_bytes
from cpu_experts.jit.compiled import kernel

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
