"""The innermost loops as vector code: a strip of 16 weight rows times some activation rows.

A format is an entry of :data:`LOOPS`: how its codes are read (:mod:`.simd_codes`) and its scales
(:mod:`.simd_scales`). The activations' bytes have signs and the weights' have none, so what codes
are shifted by is made up for by the sum of the activations, which their group carries: in the
accumulator's start where the shift is a whole number, in a product of its own where it is a
minimum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

from llvmlite import ir

from cpu_experts.errors import BackendError
from cpu_experts.jit.ir import (
    F32,
    I16,
    I32,
    I64,
    Builder,
    Value,
    const,
    gep,
    load,
    loop,
    prefetch,
    splat,
)
from cpu_experts.jit.simd_level import LEVEL
from cpu_experts.kernels.simd_codes import Codes, Sum
from cpu_experts.kernels.simd_scales import (
    Bytes,
    Exponents,
    Factors,
    Floats8,
    Nibbles,
    Plain,
    Scales,
    Shared,
    Singles,
)
from cpu_experts.kernels.vectors import (
    BITS,
    FLOATS,
    HALVES,
    INTS,
    LANES,
    PARTS,
    REGISTERS,
    SHIFT,
    SHIFT_BITS,
    fma,
)
from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import GROUP, TILE, Layout
from hybrid.formats.tables import FP4, IQ4, NF4

PREFETCH_BYTES = 2048
#: Where an activation group has its scale and its two words of sums.
SCALE_AT, SUMS_AT = GROUP, GROUP + 4
#: Flags of what :func:`cpu_experts.kernels.simd.quantize_group` makes of the sums of codes, beside
#: the number (below 256) that they are multiplied with: those of each half, and in float32.
BY_HALVES, AS_FLOATS = 256, 512

#: How many activation rows the micro-kernel takes at once: by the wide, the middle and the
#: one-row variant.
ROW_BLOCKS = {"avx512vnni": (12, 4, 1)}.get(LEVEL, (4, 2, 1))


class Loop(ABC):
    """The innermost loop of a format: a strip times some activation rows."""

    #: What an activation group carries: a number below 256 and flags.
    sums = 0

    @abstractmethod
    def emit(
        self, b: Builder, w: Value, then: Value, acts: list[Value], inner: Value
    ) -> list[list[Value]]:
        """Emit the loop over ``inner`` units; return the sums ``[n][parts]`` as float vectors."""


class Grouped(Loop):
    """Groups of int8 products, 4 neighbouring ones added up at a time, a lane a row.

    A group is one run of eight steps, or of two of four where its halves have their own scales.
    """

    def __init__(self, name: str, codes: Codes, scales: Scales) -> None:
        layout = FORMATS[name].layout
        assert layout is not None
        assert layout.planes == codes.planes
        self.layout: Layout = layout
        self.codes, self.scales = codes, scales
        self.sums = codes.zero
        if scales.runs == 2:
            self.sums |= BY_HALVES
        if scales.minimum:
            self.sums = self.sums | AS_FLOATS

    def _run(self, b: Builder, group: Value, rows: list[Value], run: int) -> list[list[Value]]:
        """A run's products with every row, added up: floats larger by SHIFT, ``[n][parts]``."""
        sums = [
            [Sum(b, self.codes, self._start(b, row, run)) for _ in range(PARTS)] for row in rows
        ]
        for step in range(run, 8, self.scales.runs):
            # Step by step, so that two vectors of codes at a time take registers.
            codes = self.codes.read(b, group, step)
            for row, own in zip(rows, sums, strict=True):
                x = splat(b, load(b, row, self.codes.inputs(step), I32), INTS)
                for part, code in zip(own, codes, strict=True):
                    part.add(code, x)
            for own in sums:
                for part in own:
                    part.pin()
        return [[b.bitcast(part.total(), FLOATS) for part in own] for own in sums]

    def _start(self, b: Builder, row: Value, run: int) -> Callable[[], Value]:
        """What a sum begins with: SHIFT less what shifted codes make it too large by.

        A word of the activation group, even where that is SHIFT alone: a constant would take a
        register.
        """
        word = run if self.codes.zero else 1
        if self.scales.runs == 2 and not self.codes.zero:
            return lambda: const(INTS, SHIFT_BITS)
        return lambda: splat(b, load(b, row, SUMS_AT + 4 * word, I32), INTS)

    def _scaled(self, b: Builder, values: list[list[Value]], scales: list[Value]) -> None:
        """Take SHIFT off ``values`` ``[n][parts]`` and multiply them by scales ``[parts]``."""
        less = const(FLOATS, -SHIFT)
        shifts = [b.fmul(scale, less) for scale in scales]
        for own in values:
            if self.scales.short:  # exact: there is one rounding, of the product
                own[:] = [fma(b, *of) for of in zip(own, scales, shifts, strict=True)]
            else:
                own[:] = [b.fmul(b.fadd(v, less), f) for v, f in zip(own, scales, strict=True)]

    def _group(
        self, b: Builder, unit: Value, here: Value, rows: list[Value]
    ) -> tuple[list[list[Value]], Factors]:
        """A group's weighted products ``[n][parts]``, and its numbers."""
        layout = self.layout
        group = gep(b, unit, b.mul(here, ir.Constant(I64, layout.group_bytes)))
        found = self._run(b, group, rows, 0)
        factors = self.scales.factors(b, layout, unit, here)
        self._scaled(b, found, factors.scales[0])
        if self.scales.runs == 2:
            others = self._run(b, group, rows, 1)
            self._scaled(b, others, factors.scales[1])
            for own, more in zip(found, others, strict=True):
                own[:] = [b.fadd(*both) for both in zip(own, more, strict=True)]
        return found, factors

    def emit(
        self, b: Builder, w: Value, then: Value, acts: list[Value], inner: Value
    ) -> list[list[Value]]:
        layout, n = self.layout, len(acts)
        size = layout.unit_bytes // layout.groups
        count = b.mul(inner, ir.Constant(I64, layout.groups))
        # What is read next lies behind this strip or elsewhere: that is where prefetching goes on.
        whole = b.mul(count, ir.Constant(I64, size))
        end, early = gep(b, w, whole), ir.Constant(I64, -(-PREFETCH_BYTES // size) * size)
        short = b.icmp_signed("<", early, whole)
        begin = b.select(short, gep(b, w, early), gep(b, then, b.sub(early, whole)))
        # Where accumulators and sums together are more than registers, the sums lie in memory:
        # they are needed once a group.
        vectors = (1 + self.scales.runs) * n * PARTS
        kept = _Kept(b, n * PARTS) if vectors + 4 > REGISTERS else None

        def body(g: Value, early: Value, *sums: Value) -> list[Value]:
            here = b.and_(g, ir.Constant(I64, layout.groups - 1))
            unit = gep(b, w, b.mul(b.sub(g, here), ir.Constant(I64, size)))
            rows = [gep(b, act, b.mul(g, ir.Constant(I64, ACT_GROUP))) for act in acts]
            for line in range(0, size, 64):
                prefetch(b, early, line)
            early = gep(b, early, size)
            early = b.select(b.icmp_unsigned("==", early, end), then, early)
            found, factors = self._group(b, unit, here, rows)
            out = [early]
            for t in range(n):
                scale = splat(b, load(b, rows[t], SCALE_AT, F32), FLOATS)
                own = [
                    splat(b, load(b, rows[t], SUMS_AT + 4 * run, F32), FLOATS)
                    for run in range(len(factors.shifts))
                ]
                for p in range(PARTS):
                    at = t * PARTS + p
                    total = sums[at] if kept is None else kept.get(at)
                    total = fma(b, found[t][p], scale, total)
                    for shift, of_codes in zip(factors.shifts, own, strict=True):
                        total = fma(b, shift[p], of_codes, total)
                    if kept is None:
                        out.append(total)
                    else:
                        kept.set(at, total)
            return out

        zeros = [const(FLOATS, 0.0)] * (n * PARTS)
        sums = loop(b, count, [begin, *(zeros if kept is None else [])], body)[1:]
        if kept is not None:
            sums = [kept.get(at) for at in range(n * PARTS)]
        return [sums[t * PARTS : (t + 1) * PARTS] for t in range(n)]


class _Floats(Loop):
    """Single inputs, widened to float32 as they are read."""

    def __init__(self, size: int, widen: Callable[[Builder, Value, int], Value]) -> None:
        self._size, self._widen = size, widen

    def emit(
        self, b: Builder, w: Value, then: Value, acts: list[Value], inner: Value
    ) -> list[list[Value]]:
        def body(k: Value, *sums: Value) -> list[Value]:
            base = gep(b, w, b.mul(k, ir.Constant(I64, TILE * self._size)))
            prefetch(b, base, PREFETCH_BYTES)
            weights = [self._widen(b, base, self._size * LANES * p) for p in range(PARTS)]
            out = []
            for t, act in enumerate(acts):
                x = splat(b, load(b, act, b.mul(k, ir.Constant(I64, 4)), F32), FLOATS)
                for p in range(PARTS):
                    out.append(fma(b, weights[p], x, sums[t * PARTS + p]))
            return out

        sums = loop(b, inner, [const(FLOATS, 0.0)] * (len(acts) * PARTS), body)
        return [sums[t * PARTS : (t + 1) * PARTS] for t in range(len(acts))]


def _widen_bf16(b: Builder, base: Value, at: int) -> Value:
    bits = b.zext(load(b, base, at, ir.VectorType(I16, LANES)), INTS)
    return b.bitcast(b.shl(bits, const(INTS, 16)), FLOATS)


def _widen_f16(b: Builder, base: Value, at: int) -> Value:
    return b.fpext(load(b, base, at, HALVES), FLOATS)


def _widen_f32(b: Builder, base: Value, at: int) -> Value:
    return load(b, base, at, FLOATS)


def _grouped(codes: Codes, scales: Scales) -> Callable[[str], Loop]:
    return lambda name: Grouped(name, codes, scales)


_IQ4, _FP4, _NF4 = (tuple(int(number) for number in table) for table in (IQ4, FP4, NF4))

#: What makes the loop of every weight format, and of ``f16``, laid out as ``bf16``, for keys and
#: values.
LOOPS: dict[str, Callable[[str], Loop]] = {
    "q4_0": _grouped(Codes((4,), middle=8), Plain()),
    "q4_1": _grouped(Codes((4,)), Plain(minimum=True)),
    "q5_0": _grouped(Codes((4, 1), middle=16), Plain()),
    "q5_1": _grouped(Codes((4, 1)), Plain(minimum=True)),
    "q8_0": _grouped(Codes((8,), middle=128), Plain()),
    "q2_k": _grouped(Codes((2,)), Nibbles(runs=2, minimum=True)),
    "q3_k": _grouped(Codes((2, 1), middle=4), Bytes(runs=2)),
    "q4_k": _grouped(Codes((4,)), Bytes(minimum=True)),
    "q5_k": _grouped(Codes((4, 1)), Bytes(minimum=True)),
    "q6_k": _grouped(Codes((4, 2), middle=32), Bytes(runs=2)),
    "iq4_nl": _grouped(Codes((4,), numbers=_IQ4), Plain()),
    "iq4_xs": _grouped(Codes((4,), numbers=_IQ4), Bytes()),
    "mxfp4": _grouped(Codes((4,), numbers=_FP4), Exponents()),
    "nvfp4": _grouped(Codes((4,), numbers=_FP4), Floats8(runs=2)),
    "int4_32": _grouped(Codes((4,)), Shared()),
    "int4_64": _grouped(Codes((4,)), Shared()),
    "int4_128": _grouped(Codes((4,)), Shared()),
    "int4_256": _grouped(Codes((4,)), Shared()),
    "nf4": _grouped(Codes((4,), numbers=_NF4), Singles()),
    "bf16": lambda _: _Floats(2, _widen_bf16),
    "f16": lambda _: _Floats(2, _widen_f16),
    "f32": lambda _: _Floats(4, _widen_f32),
}


class _Kept:
    """Float vectors that stay in memory: LLVM would spill them at worse places."""

    def __init__(self, b: Builder, count: int) -> None:
        self._builder = b
        self._slots = [b.alloca(FLOATS) for _ in range(count)]
        shown = ir.FunctionType(ir.VoidType(), [FLOATS.as_pointer()])
        for at, slot in enumerate(self._slots):
            slot.align = BITS // 8
            self.set(at, const(FLOATS, 0.0))
            b.asm(shown, "", "r,~{memory}", [slot], side_effect=True)

    def get(self, at: int) -> Value:
        return self._builder.load(self._slots[at], typ=FLOATS)

    def set(self, at: int, value: Value) -> None:
        self._builder.store(value, self._slots[at])


@cache
def loop_of(fmt: str) -> Loop:
    """The loop of a format.

    Raises
    ------
    BackendError
        When there is none.
    """
    if fmt not in LOOPS:
        raise BackendError(f"the kernels of {LEVEL} do not know the weight format {fmt!r}")
    return LOOPS[fmt](fmt)


def sums_of(fmt: str) -> int:
    """What the activations of a format carry, see :data:`BY_HALVES`."""
    return loop_of(fmt).sums
