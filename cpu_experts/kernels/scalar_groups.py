"""Loops over groups of any format in plain Python: the scalar twins of the vector code.

A format is how the number that a code stands for is read, and what a run of a group is multiplied
by and shifted by; a run is a group, or half of one that has scales of its own.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import GROUP, TILE, Layout
from hybrid.formats.tables import FP4, IQ4, NF4

#: Steps through a group's fours, in the order of the planes' fields.
_STEPS = GROUP // 4


_COUNT = itertools.count()


def of_its_own(function: Callable[..., Any]) -> Any:
    """Compile a function that is made several times under a name that no other has.

    Machine code is found by name, and what another process left in the cache has names, too: they
    have to be the same in every process, and those of different functions different.
    """
    function.__qualname__ += f"_{next(_COUNT)}"
    return njit(nogil=True)(function)


@njit(nogil=True)
def half(bits: Any) -> Any:
    """The value of an fp16 given as 16 bits."""
    size = np.uint32(np.uint32(bits & 0x7FFF) << np.uint32(13))
    if size >= 0x0F800000:  # infinite or NaN
        value = np.uint32(size | np.uint32(0x7F800000)).view(np.float32)
    else:  # the exponents' biases are 112 apart; this widens subnormal numbers too
        value = np.uint32(size).view(np.float32) * np.float32(2.0**112)
    return -value if bits >> 15 else value


def grouped(
    name: str,
    *,
    middle: int = 0,
    numbers: Any = None,
    runs: int = 1,
    scale: Callable[[Layout], Any],
    shift: Callable[[Layout], Any] | None = None,
) -> Callable[..., None]:
    """Return the loop of a format: a strip times one activation row.

    Parameters
    ----------
    middle, numbers
        The code of 0, or what the 16 codes stand for.
    scale, shift
        Make functions of a unit, a group, a run and a row.
    """
    layout = FORMATS[name].layout
    assert layout is not None
    planes, groups, unit_bytes = layout.planes, layout.groups, layout.unit_bytes
    group_bytes, shifted, looked_up = layout.group_bytes, shift is not None, numbers is not None
    first = planes[0]
    second = planes[1] if len(planes) > 1 else 0
    table = np.zeros(16, np.int32) if numbers is None else np.asarray(numbers, np.int32)
    scale_of, shift_of = scale(layout), (shift or scale)(layout)
    length = GROUP // runs

    @of_its_own
    def field(unit, at, bits, step, place):
        per = 8 // bits
        return unit[at + 64 * (step // per) + place] >> (step % per * bits) & (2**bits - 1)

    @of_its_own
    def number(unit, at, row, k):
        four, place = k // 4, 4 * row + k % 4
        step = 2 * (four % 4) + four // 4
        code = np.int32(field(unit, at, first, step, place))
        if second:
            code |= np.int32(field(unit, at + 64 * first, second, step, place)) << first
        return table[code] if looked_up else code - middle

    @of_its_own
    def loop(w, w_at, act, act_at, inner, out, out_at):
        for g in range(inner * groups):
            begin = w_at + g // groups * unit_bytes
            unit = w[begin : begin + unit_bytes]
            here = g % groups
            x = act[act_at + g * ACT_GROUP : act_at + g * ACT_GROUP + GROUP].view(np.int8)
            own = act[act_at + g * ACT_GROUP + GROUP : act_at + (g + 1) * ACT_GROUP]
            x_scale = own.view(np.float32)[0]
            for row in range(TILE):
                for run in range(runs):
                    total, codes = np.int32(0), np.int32(0)
                    for k in range(run * length, (run + 1) * length):
                        total += number(unit, here * group_bytes, row, k) * np.int32(x[k])
                        codes += np.int32(x[k])
                    value = np.float32(total) * scale_of(unit, here, run, row)
                    if shifted:
                        value += np.float32(codes) * shift_of(unit, here, run, row)
                    out[out_at + row] += value * x_scale

    return loop  # type: ignore[no-any-return]


def row_half(place: int) -> Callable[[Layout], Any]:
    """Half precision numbers of the row, of a place among them."""

    def make(layout: Layout) -> Any:
        at = layout.scales_at + 2 * TILE * place

        @of_its_own
        def read(unit, group, run, row):
            return half(unit[at : at + 2 * TILE].view(np.uint16)[row])

        return read

    return make


def group_byte(place: int, sub: int, *, sign: int) -> Callable[[Layout], Any]:
    """The same times the group's byte ``sub`` and further, one for each run, and a ``sign``."""

    def make(layout: Layout) -> Any:
        d, at, size = row_half(place)(layout), layout.subs_at, layout.subs

        @of_its_own
        def read(unit, group, run, row):
            byte = (np.int32(unit[at + TILE * (group * size + sub + run) + row]) ^ 128) - 128
            return d(unit, group, run, row) * np.float32(sign * byte)

        return read

    return make


def group_nibble(place: int, *, sign: int) -> Callable[[Layout], Any]:
    """The same times the low (``place`` 0) or the high nibble of a run's byte, and a ``sign``."""

    def make(layout: Layout) -> Any:
        d, at, size = row_half(place)(layout), layout.subs_at, layout.subs

        @of_its_own
        def read(unit, group, run, row):
            byte = np.int32(unit[at + TILE * (group * size + run) + row])
            return d(unit, group, run, row) * np.float32(sign * (byte >> (4 * place) & 15))

        return read

    return make


def row_exponent(layout: Layout) -> Any:
    """2^(e - 128) of the row's byte."""
    at = layout.scales_at

    @of_its_own
    def read(unit, group, run, row):
        return np.float32(2.0 ** (np.float64(unit[at + row]) - 128))

    return read


def group_float8(layout: Layout) -> Any:
    """The row's float32 times half of what the run's byte stands for."""
    at, scales_at, size = layout.subs_at, layout.scales_at, layout.subs

    @of_its_own
    def read(unit, group, run, row):
        bits = np.uint32(np.uint32(unit[at + TILE * (group * size + run) + row]) << np.uint32(20))
        d = unit[scales_at : scales_at + 4 * TILE].view(np.float32)[row]
        return d * (bits.view(np.float32) * np.float32(2.0**119))

    return read


def shared_half(layout: Layout) -> Any:
    """The half precision number of the row and some groups."""
    at, groups = layout.scales_at, 2 * layout.groups // len(layout.scales)

    @of_its_own
    def read(unit, group, run, row):
        begin = at + 2 * TILE * (group // groups)
        return half(unit[begin : begin + 2 * TILE].view(np.uint16)[row])

    return read


def shared_zero(layout: Layout) -> Any:
    """The same times the code of 0, and -1."""
    d, count = shared_half(layout), len(layout.scales) // 2
    at, groups = layout.scales_at + 2 * TILE * count, layout.groups // count

    @of_its_own
    def read(unit, group, run, row):
        zero = np.float32(unit[at + TILE * (group // groups) + row])
        return -d(unit, group, run, row) * zero

    return read


def shared_float(layout: Layout) -> Any:
    """The float32 of the row and some groups."""
    at, groups = layout.scales_at, layout.groups // len(layout.scales)

    @of_its_own
    def read(unit, group, run, row):
        begin = at + 4 * TILE * (group // groups)
        return unit[begin : begin + 4 * TILE].view(np.float32)[row]

    return read


#: The loops of the formats that :mod:`cpu_experts.kernels.scalar` has none of its own for.
LOOPS: dict[str, Callable[..., None]] = {
    "q4_1": grouped("q4_1", scale=row_half(0), shift=row_half(1)),
    "q5_0": grouped("q5_0", middle=16, scale=row_half(0)),
    "q5_1": grouped("q5_1", scale=row_half(0), shift=row_half(1)),
    "q2_k": grouped("q2_k", runs=2, scale=group_nibble(0, sign=1), shift=group_nibble(1, sign=-1)),
    "q3_k": grouped("q3_k", middle=4, runs=2, scale=group_byte(0, 0, sign=1)),
    "q4_k": grouped("q4_k", scale=group_byte(0, 0, sign=1), shift=group_byte(1, 1, sign=-1)),
    "q5_k": grouped("q5_k", scale=group_byte(0, 0, sign=1), shift=group_byte(1, 1, sign=-1)),
    "q6_k": grouped("q6_k", middle=32, runs=2, scale=group_byte(0, 0, sign=1)),
    "iq4_nl": grouped("iq4_nl", numbers=IQ4, scale=row_half(0)),
    "iq4_xs": grouped("iq4_xs", numbers=IQ4, scale=group_byte(0, 0, sign=1)),
    "mxfp4": grouped("mxfp4", numbers=FP4, scale=row_exponent),
    "nvfp4": grouped("nvfp4", numbers=FP4, runs=2, scale=group_float8),
    "int4_32": grouped("int4_32", scale=shared_half, shift=shared_zero),
    "int4_64": grouped("int4_64", scale=shared_half, shift=shared_zero),
    "int4_128": grouped("int4_128", scale=shared_half, shift=shared_zero),
    "int4_256": grouped("int4_256", scale=shared_half, shift=shared_zero),
    "nf4": grouped("nf4", numbers=NF4, scale=shared_float),
}
