"""iq4_xs: 4-bit codes into a table, under scales of 32 inputs in super-blocks of 256, as GGUF's.

The value is d s times what the code stands for (:data:`hybrid.formats.tables.IQ4`): a float16 d of
the super-block, a signed s of the group, -32..31, which GGUF packs in 6 bits and here takes a byte.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import half, in_order, nibbles
from hybrid.formats.groups import GROUPS, Fields, grouped, half_scales, inverse
from hybrid.formats.search import importance, nearest, symmetric
from hybrid.formats.strips import F32, GROUP, U8, Layout
from hybrid.formats.tables import IQ4, iq4_numbers

NAME = "iq4_xs"
_LEAST = -32


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    part = symmetric(w, importance(w, columns), -127, iq4_numbers)  # [N, U, G]
    at = np.argmax(np.abs(part), axis=-1)[..., None]
    extreme = np.take_along_axis(part, at, axis=-1)[..., 0]
    scale = half_scales(extreme / np.float32(_LEAST), w, NAME)
    d = scale.astype(np.float32)[..., None]
    subs = np.clip(np.rint(part * inverse(d)), _LEAST, -_LEAST - 1)
    codes = nearest(IQ4, w * inverse(d * subs)[..., None])
    return Fields(codes, subs.astype(np.int8).view(np.uint8)[..., None], (scale,))


def _values(of: Fields) -> F32:
    d = of.scales[0].astype(np.float32)[..., None, None]
    values: F32 = d * of.subs.view(np.int8).astype(np.float32) * IQ4.astype(np.float32)[of.codes]
    return values


def _blocks(raw: U8) -> Fields:
    shape = raw.shape[:2]
    codes = nibbles(raw[..., 8:].reshape(*shape, GROUPS, GROUP // 2))
    subs = (in_order(raw[..., 4:8], 4) | in_order(raw[..., 2:4], 2) << np.uint8(4)) - np.uint8(32)
    return Fields(codes.reshape(*shape, GROUPS, GROUP), subs[..., None], (half(raw, 0),))


FORMAT = grouped(
    NAME,
    Layout((4,), groups=GROUPS, subs=1),
    quantize=_quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=136,
)
