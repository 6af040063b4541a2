"""q4_0: 4-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

The value is d (q - 8).
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.elements import WHOLE, Elements, Held, all_of, halves, shared
from hybrid.formats.gguf_bits import half, nibbles
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.search import between, importance, symmetric
from hybrid.formats.strips import F32, U8, Layout

NAME = "q4_0"
_rounded = between(-8, 7)


def quantize(w: F32, columns: F32 | None = None) -> Fields:
    """Return codes 0..15 and scales of groups ``[N, U, 1, 32]``.

    Notes
    -----
    The rules of ggml's reference quantizer, in the same float32 operations: the value of largest
    magnitude, sign included, divided by -8. Where the importance of inputs is known, the scale is
    searched for.
    """
    if columns is not None:
        found = symmetric(w, importance(w, columns), -8, _rounded)[..., 0]
        scales = half_scales(found, w, NAME)
        towards = inverse(scales.astype(np.float32))[..., None, None]
        codes = (_rounded(w * towards) + 8).astype(np.uint8)
        return Fields(codes, no_subs(codes), (scales,))
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


def _hold(of: Elements) -> Held | None:
    scales, numbers = shared(of["scale"]) if all_of(of, WHOLE) else None, of["number"]
    if scales is None or (numbers < -8).any() or (numbers > 7).any():
        return None
    rounded = halves(scales[..., 0])
    if rounded is None:
        return None
    codes = (numbers + np.int16(8)).astype(np.uint8)
    return Held(Fields(codes, no_subs(codes), (rounded[0],)), rounded[1])


FORMAT = grouped(
    NAME,
    Layout((4,)),
    quantize=quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=18,
    hold=_hold,
    advised=True,
)
