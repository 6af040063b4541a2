"""Groups: what the quantized formats share, codes of 32 inputs with a float16 scale a row.

A unit holds the codes of its 16 rows, in chunks of 64 bytes, then the 16 scales. A format says
how float32 becomes codes and how the codes lie in the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.errors import FormatError
from hybrid.formats.strips import F32, GROUP, I8, I64, TILE, U8, Format

#: Groups of no larger magnitude count as zero: the inverse of their scale would overflow.
TINY = 1e-30

F16 = NDArray[np.float16]
_SCALES = 2 * TILE


def grouped(
    name: str,
    number: int,
    *,
    code_bytes: int,
    quantize: Callable[[F32], tuple[I8, F16]],
    store: Callable[[U8], U8],
    load: Callable[[U8], I8],
) -> Format:
    """Return a format of groups.

    Parameters
    ----------
    code_bytes
        Bytes that a row's codes take in a unit.
    quantize
        Turns float32 ``[N, K]`` into codes int8 ``[N, K]`` and scales ``[N, K / 32]``.
    store
        Turns codes ``[..., 8, n, 4]``, inputs by fours, into chunks ``[..., code_bytes / 4, n, 4]``
        of n rows.
    load
        Turns bytes of chunks ``[..., code_bytes / 4, n, 4]`` into ``[..., 8, n, 4]``, what the
        scales multiply.
    """
    split = TILE * code_bytes

    def pack(w: F32) -> U8:
        strips, _, cols = w.shape
        codes, scales = quantize(w.reshape(-1, cols))
        # [strip, row, group, fours, byte] -> [strip, group, fours, row, byte]
        q = codes.view(np.uint8).reshape(strips, TILE, -1, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
        units = np.empty((strips, cols // GROUP, split + _SCALES), np.uint8)
        units[:, :, :split] = store(q).reshape(strips, -1, split)
        d = np.ascontiguousarray(scales.reshape(strips, TILE, -1).transpose(0, 2, 1))
        units[:, :, split:] = d.view(np.uint8)
        return units

    def scales_of(units: U8) -> F16:
        return np.ascontiguousarray(units[:, :, split:]).view(np.float16)

    def unpack(units: U8) -> F32:
        codes = load(units[:, :, :split].reshape(*units.shape[:2], -1, TILE, 4))
        d = scales_of(units).astype(np.float32)
        values = codes.transpose(0, 3, 1, 2, 4) * d.transpose(0, 2, 1)[..., None, None]
        return values.reshape(len(units), TILE, -1)

    def unpack_rows(units: U8, rows: I64) -> F32:
        at = np.arange(len(units))
        chunks = units[:, :, :split].reshape(*units.shape[:2], -1, TILE, 4)[at, :, :, rows]
        d = scales_of(units)[at, :, rows].astype(np.float32)
        values = load(chunks[..., None, :]).reshape(*d.shape, GROUP) * d[..., None]
        return values.reshape(len(units), -1)

    return Format(
        name=name,
        number=number,
        unit_bytes=split + _SCALES,
        unit_inputs=GROUP,
        pack=pack,
        unpack=unpack,
        unpack_rows=unpack_rows,
        dense=True,
    )


def groups_of(w: F32) -> F32:
    """Return ``w`` ``[N, K]`` as groups ``[N, K / 32, 32]``.

    Raises
    ------
    FormatError
        When it holds a weight without a code.
    """
    if not np.isfinite(w).all():
        raise FormatError(
            f"{np.count_nonzero(~np.isfinite(w))} of {w.size} weights are infinite or NaN",
            hint="the source is damaged; bf16 and f32 would keep such values",
        )
    return w.reshape(len(w), -1, GROUP)


def inverse(d: F32) -> F32:
    """Return ``1 / d``; 0 where ``d`` is too small for it."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > TINY)


def half_scales(d: F32, groups: NDArray[Any], name: str) -> F16:
    """Return scales in half precision.

    Raises
    ------
    FormatError
        When one is too large for it.
    """
    with np.errstate(over="ignore"):
        scales = d.astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(
            f"weights up to {np.abs(groups).max():.3g} have no fp16 scale in {name}",
            hint="use bf16 or f32 for weights this large",
        )
    return scales
