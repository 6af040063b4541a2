"""mxfp4: 4-bit floats of 32 inputs under a power of two, the numbers of OCP's and GGUF's format.

The value is 2^(e - 128) times what the code stands for, see :data:`hybrid.formats.tables.FP4`.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import nibbles
from hybrid.formats.groups import Fields, grouped, inverse, no_subs
from hybrid.formats.strips import F32, U8, Layout
from hybrid.formats.tables import FP4, fp4_codes


def _scale(e: U8) -> F32:
    """2^(e - 128); below what float32 has in full, a subnormal number."""
    bits = np.where(
        e < 2, np.uint32(0x200000) << e.astype(np.uint32), (e.astype(np.uint32) - 1) << 23
    )
    return bits.astype(np.uint32).view(np.float32)


def _quantize(w: F32) -> Fields:
    """Of the two exponents that the largest value may have, the one that leaves less error."""
    largest = np.max(np.abs(w), axis=-1)
    with np.errstate(divide="ignore"):
        low = np.where(largest > 0, np.floor(np.log2(largest)) + 125, 0)
    best = None
    for e in (np.clip(low, 0, 254), np.clip(low + 1, 0, 254)):
        exponents = e.astype(np.uint8)
        d = _scale(exponents)[..., None]
        codes = fp4_codes(w * inverse(d))
        error = np.square(d * FP4.astype(np.float32)[codes] - w).sum(axis=-1)
        if best is None:
            best = codes, exponents, error
        else:
            better = error < best[2]
            best = (
                np.where(better[..., None], codes, best[0]),
                np.where(better, exponents, best[1]),
                error,
            )
    assert best is not None
    return Fields(best[0], no_subs(best[0]), (best[1][..., 0],))


def _values(of: Fields) -> F32:
    values: F32 = _scale(of.scales[0])[..., None, None] * FP4.astype(np.float32)[of.codes]
    return values


def _blocks(raw: U8) -> Fields:
    codes = nibbles(raw[..., 1:])
    return Fields(codes, no_subs(codes), (raw[..., 0],))


FORMAT = grouped(
    "mxfp4",
    Layout((4,), scales=(np.dtype(np.uint8),)),
    quantize=_quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=17,
)
