"""int4: 4-bit codes with a scale and a code of zero for groups of 32, 64, 128 or 256 inputs.

Checkpoints of AWQ, GPTQ and compressed-tensors have such groups. The value is d (q - z): a float16
d and a whole z of 0..16, both of a group of the row. Groups of more than 256 repeat theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.elements import WHOLE, Elements, Held, all_of, halves, shared
from hybrid.formats.groups import Fields, grouped, half_scales, inverse, no_subs
from hybrid.formats.search import importance, zeroed
from hybrid.formats.strips import F32, GROUP, SUPER, U8, Format, Half, Layout

_BYTE = np.dtype(np.uint8)


def int4_format(name: str, size: int) -> Format:
    """Return the format of groups of ``size`` inputs, a part of a super-block."""
    count = SUPER // size

    def quantize(w: F32, columns: F32 | None = None) -> Fields:
        groups = w.reshape(*w.shape[:2], count, size)
        d, zeros = zeroed(groups, importance(groups, columns), 15)
        scales = half_scales(d, w, name)
        towards = inverse(scales.astype(np.float32))
        codes = np.rint(groups * towards[..., None]) + zeros[..., None]
        return fields(np.clip(codes, 0, 15).astype(np.uint8), scales, zeros.astype(np.uint8))

    def fields(codes: U8, scales: NDArray[np.float16], zeros: U8) -> Fields:
        codes = codes.reshape(*codes.shape[:2], SUPER // GROUP, GROUP)
        parts = [part[..., at] for part in (scales, zeros) for at in range(count)]
        return Fields(codes, no_subs(codes), tuple(parts))

    def values(of: Fields) -> F32:
        d = np.stack(of.scales[:count], axis=-1).astype(np.float32)
        zeros = np.stack(of.scales[count:], axis=-1).astype(np.int8)
        codes = of.codes.view(np.int8).reshape(*of.codes.shape[:2], count, size)
        found: F32 = d[..., None] * (codes - zeros[..., None]).astype(np.float32)
        return found.reshape(of.codes.shape)

    def hold(of: Elements) -> Held | None:
        groups = of.reshape(*of.shape[:2], count, size)
        scales = shared(groups["scale"]) if all_of(of, WHOLE) else None
        if scales is None:
            return None
        zeros = np.maximum(-groups["number"].min(axis=-1), 0)
        codes = groups["number"] + zeros[..., None]
        rounded = halves(scales)
        if rounded is None or (codes > 15).any() or (zeros > 16).any():
            return None
        found = fields(codes.astype(np.uint8), rounded[0], zeros.astype(np.uint8))
        return Held(found, rounded[1])

    layout = Layout((4,), groups=SUPER // GROUP, scales=(Half,) * count + (_BYTE,) * count)
    return grouped(name, layout, quantize=quantize, values=values, hold=hold)
