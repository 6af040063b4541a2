"""Affine groups of 32 in super-blocks of 256, as q4_k and q5_k have them.

The value is d s q - e m: float16 d and e of the super-block, whole numbers s and m of the group,
0..63. GGUF packs these in 6 bits each, here they take a byte.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import fields, half
from hybrid.formats.groups import GROUPS, Fields, grouped, half_scales, inverse
from hybrid.formats.search import affine, importance
from hybrid.formats.strips import F32, GROUP, SUPER, U8, Format, Half, Layout

_MOST = 63


def affine_super(name: str, bits: int) -> Format:
    """Return the format of codes of 4 or 5 ``bits``."""
    top = 2**bits - 1

    def quantize(w: F32, columns: F32 | None = None) -> Fields:
        parts = affine(w, importance(w, columns), top)
        scales, subs = [], []
        for part in parts:  # [N, U, G]
            scale = half_scales(part.max(axis=-1) / np.float32(_MOST), w, name)
            towards = inverse(scale.astype(np.float32))[..., None]
            scales.append(scale)
            subs.append(np.clip(np.rint(part * towards), 0, _MOST).astype(np.uint8))
        d, m = (
            (scale.astype(np.float32)[..., None] * sub)[..., None]
            for scale, sub in zip(scales, subs, strict=True)
        )
        codes = np.clip(np.rint((w + m) * inverse(d)), 0, top).astype(np.uint8)
        return Fields(codes, np.stack(subs, axis=-1), tuple(scales))

    def values(of: Fields) -> F32:
        d, m = (
            scale.astype(np.float32)[..., None] * of.subs[..., at].astype(np.float32)
            for at, scale in enumerate(of.scales)
        )
        found: F32 = d[..., None] * of.codes.astype(np.float32) - m[..., None]
        return found

    def blocks(raw: U8) -> Fields:
        codes = fields(raw[..., -SUPER // 2 :], GROUP, 4)
        if bits == 5:
            codes = codes | fields(raw[..., 16 : 16 + GROUP], GROUP, 1) << np.uint8(4)
        shape = (*raw.shape[:2], GROUPS, GROUP)
        return Fields(codes.reshape(shape), _sixes(raw[..., 4:16]), (half(raw, 0), half(raw, 2)))

    return grouped(
        name,
        Layout((4, 1)[: bits - 3], groups=GROUPS, subs=2, scales=(Half, Half)),
        quantize=quantize,
        values=values,
        blocks=blocks,
        block_bytes=16 + SUPER * bits // 8,
    )


def _sixes(raw: U8) -> U8:
    """The groups' s and m ``[..., 8, 2]``, of 12 bytes.

    Of both the first four lie in 6 bits; of the others low bits are in the last four bytes, and
    high bits above those of the first four.
    """
    s, m, low = (raw[..., at : at + 4] for at in (0, 4, 8))
    both = [
        np.concatenate([part & 0x3F, nibble | (part >> 2 & 0x30)], axis=-1)
        for part, nibble in ((s, low & 0x0F), (m, low >> 4))
    ]
    return np.stack(both, axis=-1)
