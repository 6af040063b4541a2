"""q4_0: 4-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

The value is d (q - 8).
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import half, nibbles
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.strips import F32, U8, Layout

NAME = "q4_0"


def quantize(w: F32) -> Fields:
    """Return codes 0..15 and scales of groups ``[N, U, 1, 32]``.

    Notes
    -----
    The rules of ggml's reference quantizer, in the same float32 operations: the value of largest
    magnitude, sign included, divided by -8.
    """
    at = np.argmax(np.abs(w), axis=-1)[..., None]
    d = np.take_along_axis(w, at, axis=-1)[..., 0] / np.float32(-8)
    codes = np.clip(w * inverse(d)[..., None] + np.float32(8.5), 0, 15).astype(np.uint8)
    return Fields(codes, no_subs(codes), (half_scales(d[..., 0], w, NAME),))


def _values(of: Fields) -> F32:
    d = of.scales[0].astype(np.float32)[..., None, None]
    values: F32 = d * (of.codes.astype(np.int8) - np.int8(8)).astype(np.float32)
    return values


def _blocks(raw: U8) -> Fields:
    codes = nibbles(raw[..., 2:])
    return Fields(codes, no_subs(codes), (half(raw, 0),))


FORMAT = grouped(
    NAME,
    Layout((4,)),
    quantize=quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=18,
    advised=True,
)
