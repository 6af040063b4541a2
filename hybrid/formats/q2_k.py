"""q2_k: 2-bit codes under scales and minima of 16 inputs, the numbers of GGUF's format.

The value is d s q - e m: float16 d and e of a super-block of 256, whole numbers s and m of the half
group, 0..15, the low and the high nibble of one byte.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import fields, half
from hybrid.formats.groups import F16, GROUPS, Fields, grouped, half_scales, inverse
from hybrid.formats.search import affine, importance
from hybrid.formats.strips import F32, GROUP, U8, Half, Layout

NAME = "q2_k"
_TOP, _MOST = 3, 15


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    halves = w.reshape(*w.shape[:3], 2, GROUP // 2)
    scales, subs = [], []
    for part in affine(halves, importance(halves, columns), _TOP):  # [N, U, G, 2]
        scale = half_scales(part.max(axis=(-1, -2)) / np.float32(_MOST), w, NAME)
        towards = inverse(scale.astype(np.float32))[..., None, None]
        scales.append(scale)
        subs.append(np.clip(np.rint(part * towards), 0, _MOST).astype(np.uint8))
    both = subs[0] | subs[1] << np.uint8(4)
    d, m = _parts(both, scales[0], scales[1])
    codes = np.clip(np.rint((halves + m) * inverse(d)), 0, _TOP).astype(np.uint8)
    return Fields(codes.reshape(w.shape), both, tuple(scales))


def _parts(subs: U8, d: F16, e: F16) -> tuple[F32, F32]:
    """``d s`` and ``e m`` ``[N, U, G, 2, 1]``."""
    scales, shifts = (
        scale.astype(np.float32)[..., None, None] * whole.astype(np.float32)
        for scale, whole in ((d, subs & 15), (e, subs >> 4))
    )
    return scales[..., None], shifts[..., None]


def _values(of: Fields) -> F32:
    d, m = _parts(of.subs, *of.scales)
    halves = of.codes.reshape(*of.codes.shape[:3], 2, GROUP // 2).astype(np.float32)
    values: F32 = d * halves - m
    return values.reshape(of.codes.shape)


def _blocks(raw: U8) -> Fields:
    shape = raw.shape[:2]
    codes = fields(raw[..., 16:80], GROUP, 2).reshape(*shape, GROUPS, GROUP)
    subs = raw[..., :16].reshape(*shape, GROUPS, 2)
    return Fields(codes, subs, (half(raw, 80), half(raw, 82)))


FORMAT = grouped(
    NAME,
    Layout((2,), groups=GROUPS, subs=2, scales=(Half, Half)),
    quantize=_quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=84,
)
