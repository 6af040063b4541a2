"""Groups of 16 in super-blocks of 256 with signed scales, as q3_k and q6_k have them.

The value is d s (q - z): a float16 d of the super-block, a signed byte s of the half group (GGUF
packs q3_k's in 6 bits), z half of what the codes span.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid.formats.groups import GROUPS, Fields, grouped, half_scales, inverse
from hybrid.formats.search import between, importance, symmetric
from hybrid.formats.strips import F32, GROUP, U8, Format, Layout


def signed_super(
    name: str, planes: tuple[int, ...], least: int, *, blocks: Callable[[U8], Fields],
    block_bytes: int,
) -> Format:  # fmt: skip
    """Return the format of codes in ``planes`` whose sub-scales are at least ``least``."""
    zero = 2 ** (sum(planes) - 1)
    rounded = between(-zero, zero - 1)

    def quantize(w: F32, columns: F32 | None = None) -> Fields:
        halves = w.reshape(*w.shape[:3], 2, GROUP // 2)
        weights = halves * halves if columns is None else importance(halves, columns)
        part = symmetric(halves, weights, -zero, rounded)  # [N, U, G, 2]
        flat = part.reshape(*part.shape[:2], -1)
        at = np.argmax(np.abs(flat), axis=-1)[..., None]
        extreme = np.take_along_axis(flat, at, axis=-1)[..., 0]
        scale = half_scales(extreme / np.float32(least), w, name)
        d = scale.astype(np.float32)[..., None, None]
        subs = np.clip(np.rint(part * inverse(d)), least, -least - 1)
        codes = (rounded(halves * inverse(d * subs)[..., None]) + zero).astype(np.uint8)
        return Fields(codes.reshape(w.shape), subs.astype(np.int8).view(np.uint8), (scale,))

    def values(of: Fields) -> F32:
        d = of.scales[0].astype(np.float32)[..., None, None]
        scales = (d * of.subs.view(np.int8).astype(np.float32))[..., None]
        halves = of.codes.reshape(*of.codes.shape[:3], 2, GROUP // 2)
        found: F32 = scales * (halves.astype(np.int8) - np.int8(zero)).astype(np.float32)
        return found.reshape(of.codes.shape)

    return grouped(
        name,
        Layout(planes, groups=GROUPS, subs=2),
        quantize=quantize,
        values=values,
        blocks=blocks,
        block_bytes=block_bytes,
    )
