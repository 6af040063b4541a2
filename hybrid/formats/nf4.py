"""nf4: 4-bit codes into a table of normal quantiles, of 64 inputs with a float32 scale.

The numbers of bitsandbytes' format (QLoRA, 2305.14314), but for their table, of which the kernels
need whole steps: :data:`hybrid.formats.tables.NF4`. The value is d times what the code stands for.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.elements import NORMAL, Elements, Held, all_of, shared
from hybrid.formats.groups import Fields, grouped, inverse, no_subs
from hybrid.formats.search import importance, nearest, symmetric
from hybrid.formats.strips import F32, GROUP, SUPER, U8, Layout
from hybrid.formats.tables import NF4, NF4_STEPS

_SIZE = 64
_COUNT = SUPER // _SIZE


def _fields(codes: U8, scales: F32) -> Fields:
    codes = codes.reshape(*codes.shape[:2], SUPER // GROUP, GROUP)
    return Fields(codes, no_subs(codes), tuple(scales[..., at] for at in range(_COUNT)))


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    """The rules of bitsandbytes: the largest magnitude of a group is the table's 1."""
    groups = w.reshape(*w.shape[:2], _COUNT, _SIZE)
    if columns is None:
        scales = np.abs(groups).max(axis=-1) / np.float32(NF4_STEPS)
    else:
        scales = symmetric(groups, importance(groups, columns), NF4_STEPS, _numbers)
    return _fields(nearest(NF4, groups * inverse(scales)[..., None]), scales)


def _numbers(x: F32) -> F32:
    """What is nearest to x in the table."""
    return NF4.astype(np.float32)[nearest(NF4, x)]


def _values(of: Fields) -> F32:
    d = np.stack(of.scales, axis=-1)
    numbers = NF4.astype(np.float32)[of.codes].reshape(*of.codes.shape[:2], _COUNT, _SIZE)
    values: F32 = d[..., None] * numbers
    return values.reshape(of.codes.shape)


def _hold(of: Elements) -> Held | None:
    groups = of.reshape(*of.shape[:2], _COUNT, _SIZE)
    scales = shared(groups["scale"]) if all_of(of, NORMAL) else None
    if scales is None:
        return None
    steps = (scales / np.float32(NF4_STEPS)).astype(np.float32)
    return Held(_fields(of["number"].astype(np.uint8), steps), False)


FORMAT = grouped(
    "nf4",
    Layout((4,), groups=SUPER // GROUP, scales=(np.dtype("<f4"),) * _COUNT),
    quantize=_quantize,
    values=_values,
    hold=_hold,
)
