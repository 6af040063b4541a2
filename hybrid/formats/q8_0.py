"""q8_0: 8-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

The value is d q, the code a signed byte.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.elements import WHOLE, Elements, Held, all_of, halves, shared
from hybrid.formats.gguf_bits import half
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.strips import F32, U8, Layout

NAME = "q8_0"


def quantize(w: F32, columns: F32 | None = None) -> Fields:
    """Return codes -127..127 and scales of groups ``[N, U, 1, 32]``.

    Notes
    -----
    The rules of ggml's reference quantizer, in the same float32 operations: the largest magnitude
    divided by 127, halves rounded away from zero. No importance of inputs changes that.
    """
    d = np.max(np.abs(w), axis=-1) / np.float32(127)
    scaled = w * inverse(d)[..., None]
    whole = np.trunc(scaled)
    codes = whole + np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), 0)
    codes = codes.astype(np.int8).view(np.uint8)
    return Fields(codes, no_subs(codes), (half_scales(d[..., 0], w, NAME),))


def _values(of: Fields) -> F32:
    d = of.scales[0].astype(np.float32)[..., None, None]
    values: F32 = of.codes.view(np.int8).astype(np.float32) * d
    return values


def _blocks(raw: U8) -> Fields:
    codes = raw[..., None, 2:]
    return Fields(codes, no_subs(codes), (half(raw, 0),))


def _hold(of: Elements) -> Held | None:
    scales, numbers = shared(of["scale"]) if all_of(of, WHOLE) else None, of["number"]
    if scales is None or (numbers < -128).any() or (numbers > 127).any():
        return None
    rounded = halves(scales[..., 0])
    if rounded is None:
        return None
    codes = numbers.astype(np.int8).view(np.uint8)
    return Held(Fields(codes, no_subs(codes), (rounded[0],)), rounded[1])


FORMAT = grouped(
    NAME,
    Layout((8,)),
    quantize=quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=34,
    hold=_hold,
    advised=True,
)
