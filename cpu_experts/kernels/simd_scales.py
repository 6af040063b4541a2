"""Scales of groups as vectors of float32, a lane a row: what sums of products are multiplied by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from llvmlite import ir

from cpu_experts.jit.ir import I64, Builder, Value, const, gep
from cpu_experts.kernels.vectors import FLOATS, HALVES, INTS, SUBS, read
from hybrid.formats.strips import TILE, Layout


class Factors(NamedTuple):
    """A group's numbers: each ``[runs][parts]``.

    ``scales`` multiply products, ``shifts`` sums of activations; no shifts: there is no minimum.
    """

    scales: list[list[Value]]
    shifts: list[list[Value]]


class Scales(ABC):
    """How a format's scales are read.

    Parameters
    ----------
    runs
        Parts of a group that have scales of their own: 1 or 2.
    minimum
        Whether there is a lowest value beside the scale.
    """

    #: Whether ``SHIFT`` times a scale is a float32 exactly: scales of 22 bits at most.
    short = True

    def __init__(self, *, runs: int = 1, minimum: bool = False) -> None:
        self.runs, self.minimum = runs, minimum

    @abstractmethod
    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        """The numbers of a group of the unit that begins at ``unit``."""

    def _subs(self, b: Builder, layout: Layout, unit: Value, group: Value) -> list[list[Value]]:
        """The group's own bytes ``[bytes][parts]``."""
        base = gep(b, unit, b.mul(group, ir.Constant(I64, TILE * layout.subs)))
        return [read(b, base, layout.subs_at + TILE * i, SUBS, 1) for i in range(layout.subs)]


class Plain(Scales):
    """A half precision scale of the row, and its lowest value."""

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        scales = [_halves(b, layout, unit, 0)]
        return Factors(scales, [_halves(b, layout, unit, 1)] if self.minimum else [])


class Bytes(Scales):
    """A half precision scale of the row times a byte of the group, with a sign or without one."""

    def __init__(self, *, runs: int = 1, minimum: bool = False) -> None:
        super().__init__(runs=runs, minimum=minimum)

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        subs = [
            [b.sitofp(b.sext(v, INTS), FLOATS) for v in part]
            for part in self._subs(b, layout, unit, group)
        ]
        d = _halves(b, layout, unit, 0)
        scales = [_times(b, d, part) for part in subs[: self.runs]]
        if not self.minimum:
            return Factors(scales, [])
        less = [b.fneg(v) for v in _halves(b, layout, unit, 1)]
        return Factors(scales, [_times(b, less, part) for part in subs[self.runs :]])


class Nibbles(Scales):
    """The same with scale and minimum in one byte."""

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        both = [[b.zext(v, INTS) for v in part] for part in self._subs(b, layout, unit, group)]
        d = _halves(b, layout, unit, 0)
        less = [b.fneg(v) for v in _halves(b, layout, unit, 1)]
        low = [[b.sitofp(b.and_(v, const(INTS, 15)), FLOATS) for v in part] for part in both]
        high = [[b.sitofp(b.lshr(v, const(INTS, 4)), FLOATS) for v in part] for part in both]
        return Factors(
            [_times(b, d, part) for part in low], [_times(b, less, part) for part in high]
        )


class Exponents(Scales):
    """A byte of the row: 2^(e - 128), which in float32 is subnormal for 0 and 1."""

    short = False  # they may be too large

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        scales = []
        for raw in read(b, unit, layout.scales_at, SUBS, 1):
            e = b.zext(raw, INTS)
            small = b.shl(const(INTS, 0x200000), e)
            normal = b.shl(b.sub(e, const(INTS, 1)), const(INTS, 23))
            few = b.icmp_unsigned("<", e, const(INTS, 2))
            scales.append(b.bitcast(b.select(few, small, normal), FLOATS))
        return Factors([scales], [])


class Floats8(Scales):
    """A float32 of the row times a byte of the half group: a float of 4 + 3 bits, halved.

    Its bits are those of a float32 shifted by 20, but for the exponents' biases, 120 apart.
    """

    short = False

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        d = read(b, unit, layout.scales_at, FLOATS, 4)
        scales = []
        for part in self._subs(b, layout, unit, group):
            bits = [b.shl(b.zext(v, INTS), const(INTS, 20)) for v in part]
            small = [b.fmul(b.bitcast(v, FLOATS), const(FLOATS, 2.0**119)) for v in bits]
            scales.append(_times(b, d, small))
        return Factors(scales, [])


class Shared(Scales):
    """A half precision scale of the row and some groups, and a byte: the code of 0."""

    def __init__(self) -> None:
        super().__init__(minimum=True)

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        count = len(layout.scales) // 2
        which = _which(b, layout, count, group)
        own = gep(b, unit, b.mul(which, ir.Constant(I64, 2 * TILE)))
        scales = [b.fpext(v, FLOATS) for v in read(b, own, layout.scales_at, HALVES, 2)]
        own = gep(b, unit, b.mul(which, ir.Constant(I64, TILE)))
        raw = read(b, own, layout.scales_at + 2 * TILE * count, SUBS, 1)
        zeros = [b.sitofp(b.zext(v, INTS), FLOATS) for v in raw]
        return Factors([scales], [_times(b, [b.fneg(v) for v in scales], zeros)])


class Singles(Scales):
    """A float32 of the row and some groups."""

    short = False

    def factors(self, b: Builder, layout: Layout, unit: Value, group: Value) -> Factors:
        which = _which(b, layout, len(layout.scales), group)
        own = gep(b, unit, b.mul(which, ir.Constant(I64, 4 * TILE)))
        return Factors([read(b, own, layout.scales_at, FLOATS, 4)], [])


def _which(b: Builder, layout: Layout, count: int, group: Value) -> Value:
    """The place of a group's numbers among the ``count`` of a unit."""
    shift = (layout.groups // count).bit_length() - 1
    return b.lshr(group, ir.Constant(I64, shift))


def _halves(b: Builder, layout: Layout, unit: Value, place: int) -> list[Value]:
    """The row's half precision numbers of a place, widened."""
    raw = read(b, unit, layout.scales_at + 2 * TILE * place, HALVES, 2)
    return [b.fpext(v, FLOATS) for v in raw]


def _times(b: Builder, left: list[Value], right: list[Value]) -> list[Value]:
    return [b.fmul(x, y) for x, y in zip(left, right, strict=True)]
