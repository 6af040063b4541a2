"""q5_0: 5-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

The value is d (q - 16).
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import half, in_order, nibbles
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.search import between, importance, symmetric
from hybrid.formats.strips import F32, U8, Layout

NAME = "q5_0"


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    rounded = between(-16, 15)
    scales = half_scales(symmetric(w, importance(w, columns), -16, rounded)[..., 0], w, NAME)
    d = inverse(scales.astype(np.float32))[..., None, None]
    codes = (rounded(w * d) + 16).astype(np.uint8)
    return Fields(codes, no_subs(codes), (scales,))


def _values(of: Fields) -> F32:
    d = of.scales[0].astype(np.float32)[..., None, None]
    values: F32 = d * (of.codes.astype(np.int8) - np.int8(16)).astype(np.float32)
    return values


def _blocks(raw: U8) -> Fields:
    codes = nibbles(raw[..., 6:]) | in_order(raw[..., None, 2:6], 1) << np.uint8(4)
    return Fields(codes, no_subs(codes), (half(raw, 0),))


FORMAT = grouped(
    NAME, Layout((4, 1)), quantize=_quantize, values=_values, blocks=_blocks, block_bytes=22
)
