"""Affine groups of 32: codes between a lowest and a highest value, as q4_1 and q5_1 have them.

The value is d q + m, both float16.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import half, in_order, nibbles
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.search import affine, importance
from hybrid.formats.strips import F32, U8, Format, Half, Layout


def affine_format(name: str, bits: int) -> Format:
    """Return the format of codes of 4 or 5 ``bits``."""
    top = 2**bits - 1

    def quantize(w: F32, columns: F32 | None = None) -> Fields:
        d, less = affine(w, importance(w, columns), top, negative=True)
        scales = half_scales(d[..., 0], w, name), half_scales(-less[..., 0], w, name)
        d, m = (part.astype(np.float32)[..., None, None] for part in scales)
        codes = np.clip(np.rint((w - m) * inverse(d)), 0, top).astype(np.uint8)
        return Fields(codes, no_subs(codes), scales)

    def values(of: Fields) -> F32:
        d, m = (part.astype(np.float32)[..., None, None] for part in of.scales)
        found: F32 = d * of.codes.astype(np.float32) + m
        return found

    def blocks(raw: U8) -> Fields:
        codes = nibbles(raw[..., -16:])
        if bits == 5:
            codes = codes | in_order(raw[..., None, 4:8], 1) << np.uint8(4)
        return Fields(codes, no_subs(codes), (half(raw, 0), half(raw, 2)))

    layout = Layout((4, 1)[: bits - 3], scales=(Half, Half))
    return grouped(
        name,
        layout,
        quantize=quantize,
        values=values,
        blocks=blocks,
        block_bytes=4 + 4 * bits,
    )
