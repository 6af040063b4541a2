"""iq4_nl: 4-bit codes into a table, of 32 inputs with a float16 scale, as GGUF's format.

The value is d times what the code stands for, see :data:`hybrid.formats.tables.IQ4`.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import half, nibbles
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.search import importance, nearest, symmetric
from hybrid.formats.strips import F32, U8, Layout
from hybrid.formats.tables import IQ4, iq4_numbers

NAME = "iq4_nl"


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    found = symmetric(w, importance(w, columns), -127, iq4_numbers)[..., 0]
    scales = half_scales(found, w, NAME)
    codes = nearest(IQ4, w * inverse(scales.astype(np.float32))[..., None, None])
    return Fields(codes, no_subs(codes), (scales,))


def _values(of: Fields) -> F32:
    values: F32 = (
        of.scales[0].astype(np.float32)[..., None, None] * IQ4.astype(np.float32)[of.codes]
    )
    return values


def _blocks(raw: U8) -> Fields:
    codes = nibbles(raw[..., 2:])
    return Fields(codes, no_subs(codes), (half(raw, 0),))


FORMAT = grouped(
    NAME, Layout((4,)), quantize=_quantize, values=_values, blocks=_blocks, block_bytes=18
)
