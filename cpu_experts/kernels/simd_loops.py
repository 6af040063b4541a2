"""The innermost loops as vector code: a strip of 16 weight rows times some activation rows.

A format is an entry of :data:`LOOPS`. A level is a vector width and a way to add up products of 4
neighbouring bytes:

* ``avx512vnni``, ``avxvnni``: ``vpdpbusd`` into int32 lanes, one a row.
* ``avx2``: ``vpmaddubsw`` into int16 lanes, two a row. A group of 32 q4_0 codes cannot
  overflow them (8 steps of at most 2 * 15 * 127, and the start value's wrap-around cancels),
  so one widening a group is enough; q8_0 widens at every step.

``LEVEL-emulated`` is a level's code with its dot product spelled out in ordinary
instructions: slow, and there to check a level on a machine that lacks it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from llvmlite import ir

from cpu_experts.errors import BackendError
from cpu_experts.jit.ir import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    call,
    const,
    gep,
    load,
    loop,
    prefetch,
    splat,
)
from cpu_experts.jit.simd_level import EMULATED, LEVEL
from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import GROUP, TILE

PREFETCH_BYTES = 2048

#: How many activation rows the micro-kernel takes at once: by the wide, the middle and the
#: one-row variant.
ROW_BLOCKS = {"avx512vnni": (12, 4, 1)}.get(LEVEL, (4, 2, 1))

BITS = 512 if LEVEL == "avx512vnni" else 256
LANES = BITS // 32
PARTS = TILE // LANES
_REGISTERS = 32 if BITS == 512 else 16
_BYTES = ir.VectorType(I8, 4 * LANES)
_WORDS = ir.VectorType(I16, 2 * LANES)
_INTS = ir.VectorType(I32, LANES)
_FLOATS = ir.VectorType(F32, LANES)
_HALVES = ir.VectorType(F16, LANES)


def _fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return call(b, f"llvm.fma.v{LANES}f32", _FLOATS, [x, y, z])


def _pin(b: Builder, value: Value) -> Value:
    """Fix the order of what comes before and after: an empty instruction LLVM cannot see into."""
    if EMULATED:  # the vector may be wider than this processor's registers
        return value
    fn_type = ir.FunctionType(value.type, [value.type])
    return b.asm(fn_type, "", "=x,0", [value], side_effect=True)


class Loop(ABC):
    """The innermost loop of a format: a strip times some activation rows."""

    #: What the weights' codes are shifted by; activations carry its product.
    offset = 0

    @abstractmethod
    def emit(
        self, b: Builder, w: Value, then: Value, acts: list[Value], inner: Value
    ) -> list[list[Value]]:
        """Emit the loop over ``inner`` units; return the sums ``[n][parts]`` as float vectors."""


class Quantized(Loop):
    """Groups of int8 products, 4 neighbouring ones added up at a time, a lane a row."""

    #: Whether weight bytes are signed, which vpdpbusd's first operand is not.
    signed = False
    #: Whether two int16 lanes a row can hold the sum of a group.
    pairs = False

    def __init__(self, name: str) -> None:
        self.size = FORMATS[name].unit_bytes

    @abstractmethod
    def codes(self, b: Builder, base: Value, step: int) -> list[Value]:
        """Weight bytes of 4 inputs."""

    @abstractmethod
    def inputs(self, step: int) -> int:
        """Where the 4 activation bytes of a step lie in the group."""

    def start(self, b: Builder, packed: Value) -> Value:
        """Accumulator from the activation group's start value."""
        lanes = splat(b, packed, _INTS)
        return b.bitcast(lanes, _WORDS) if self.pairs else lanes

    def step(self, b: Builder, acc: Value, w: Value, x: Value) -> Value:
        """Add one chunk: ``w`` bytes, ``x`` the same 4 activation bytes in every lane."""
        if EMULATED:
            return self._emulated(b, acc, w, b.bitcast(x, _BYTES))
        if LEVEL != "avx2":
            return call(
                b,
                f"llvm.x86.avx512.vpdpbusd.{BITS}",
                _INTS,
                [acc, b.bitcast(w, _INTS), x],
            )
        if self.pairs:
            return b.add(acc, _madd_bytes(b, w, b.bitcast(x, _BYTES)))
        no_poison = ir.Constant(ir.IntType(1), 0)
        size = call(b, "llvm.abs.v32i8", _BYTES, [w, no_poison])
        signed = call(b, "llvm.x86.avx2.psign.b", _BYTES, [b.bitcast(x, _BYTES), w])
        return b.add(acc, _madd_words(b, _madd_bytes(b, size, signed)))

    def total(self, b: Builder, acc: Value) -> Value:
        """The accumulator as float32, one lane a row."""
        if self.pairs:
            if EMULATED:
                low = b.ashr(b.shl(b.bitcast(acc, _INTS), const(_INTS, 16)), const(_INTS, 16))
                acc = b.add(low, b.ashr(b.bitcast(acc, _INTS), const(_INTS, 16)))
            else:
                acc = _madd_words(b, acc)
        return b.sitofp(acc, _FLOATS)

    def _emulated(self, b: Builder, acc: Value, w: Value, x: Value) -> Value:
        lane, extend = (I16, 2) if self.pairs else (I32, 4)
        wide = ir.VectorType(lane, 4 * LANES)
        products = b.mul(b.sext(w, wide) if self.signed else b.zext(w, wide), b.sext(x, wide))
        for at in range(extend):
            picks = ir.Constant(
                ir.VectorType(I32, 4 * LANES // extend),
                [extend * i + at for i in range(4 * LANES // extend)],
            )
            acc = b.add(acc, b.shuffle_vector(products, ir.Constant(wide, ir.Undefined), picks))
        return acc

    def emit(
        self, b: Builder, w: Value, then: Value, acts: list[Value], inner: Value
    ) -> list[list[Value]]:
        n, size = len(acts), self.size
        # What is read next lies behind this strip or elsewhere: that is where prefetching goes on.
        whole = b.mul(inner, ir.Constant(I64, size))
        end, early = gep(b, w, whole), ir.Constant(I64, -(-PREFETCH_BYTES // size) * size)
        short = b.icmp_signed("<", early, whole)
        begin = b.select(short, gep(b, w, early), gep(b, then, b.sub(early, whole)))
        # Where accumulators and sums together are more than registers, the sums lie in memory:
        # they are needed once a group.
        kept = _Kept(b, n * PARTS) if 2 * n * PARTS + 4 > _REGISTERS else None

        def body(g: Value, early: Value, *sums: Value) -> list[Value]:
            base = gep(b, w, b.mul(g, ir.Constant(I64, size)))
            rows = [gep(b, act, b.mul(g, ir.Constant(I64, ACT_GROUP))) for act in acts]
            for line in range(0, size, 64):
                prefetch(b, early, line)
            early = gep(b, early, size)
            early = b.select(b.icmp_unsigned("==", early, end), then, early)
            accs = [[self.start(b, load(b, row, GROUP + 4, I32))] * PARTS for row in rows]
            for step in range(GROUP // 4):
                # Step by step, so that two vectors of codes at a time take registers.
                codes = self.codes(b, base, step)
                for t in range(n):
                    x = splat(b, load(b, rows[t], self.inputs(step), I32), _INTS)
                    for p in range(PARTS):
                        accs[t][p] = self.step(b, accs[t][p], codes[p], x)
                accs = [[_pin(b, acc) for acc in row] for row in accs]
            scales = [
                b.fpext(load(b, base, size - 2 * TILE + 2 * LANES * p, _HALVES), _FLOATS)
                for p in range(PARTS)
            ]
            out = [early]
            for t in range(n):
                scale = splat(b, load(b, rows[t], GROUP, F32), _FLOATS)
                for p in range(PARTS):
                    at = t * PARTS + p
                    factor, total = b.fmul(scale, scales[p]), self.total(b, accs[t][p])
                    if kept is None:
                        out.append(_fma(b, total, factor, sums[at]))
                    else:
                        kept.set(at, _fma(b, total, factor, kept.get(at)))
            return out

        zeros = [const(_FLOATS, 0.0)] * (n * PARTS)
        sums = loop(b, inner, [begin, *(zeros if kept is None else [])], body)[1:]
        if kept is not None:
            sums = [kept.get(at) for at in range(n * PARTS)]
        return [sums[t * PARTS : (t + 1) * PARTS] for t in range(n)]


def _chunk(b: Builder, base: Value, chunk: int) -> list[Value]:
    """The bytes of a chunk of 64."""
    return [load(b, base, 64 * chunk + p * BITS // 8, _BYTES) for p in range(PARTS)]


def _madd_bytes(b: Builder, unsigned: Value, signed: Value) -> Value:
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", _WORDS, [unsigned, signed])


def _madd_words(b: Builder, words: Value) -> Value:
    return call(b, "llvm.x86.avx2.pmadd.wd", _INTS, [words, const(_WORDS, 1)])


class _Q4(Quantized):
    """q4_0: of a chunk the low nibbles, then the high ones."""

    offset = 8
    pairs = LEVEL == "avx2"

    def codes(self, b: Builder, base: Value, step: int) -> list[Value]:
        raw = _chunk(b, base, step // 2)
        if step % 2:
            four = const(_WORDS, 4)
            raw = [b.bitcast(b.lshr(b.bitcast(v, _WORDS), four), _BYTES) for v in raw]
        return [b.and_(v, const(_BYTES, 15)) for v in raw]

    def inputs(self, step: int) -> int:
        return 4 * (step // 2) + 16 * (step % 2)


class _Q8(Quantized):
    """q8_0: bytes as they are on AVX2, shifted by 128 to be unsigned elsewhere."""

    offset = 0 if LEVEL == "avx2" else 128
    signed = LEVEL == "avx2"

    def codes(self, b: Builder, base: Value, step: int) -> list[Value]:
        raw = _chunk(b, base, step)
        return raw if self.signed else [b.xor(v, const(_BYTES, 0x80)) for v in raw]

    def inputs(self, step: int) -> int:
        return 4 * step


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
                x = splat(b, load(b, act, b.mul(k, ir.Constant(I64, 4)), F32), _FLOATS)
                for p in range(PARTS):
                    out.append(_fma(b, weights[p], x, sums[t * PARTS + p]))
            return out

        sums = loop(b, inner, [const(_FLOATS, 0.0)] * (len(acts) * PARTS), body)
        return [sums[t * PARTS : (t + 1) * PARTS] for t in range(len(acts))]


def _widen_bf16(b: Builder, base: Value, at: int) -> Value:
    bits = b.zext(load(b, base, at, ir.VectorType(I16, LANES)), _INTS)
    return b.bitcast(b.shl(bits, const(_INTS, 16)), _FLOATS)


def _widen_f16(b: Builder, base: Value, at: int) -> Value:
    return b.fpext(load(b, base, at, _HALVES), _FLOATS)


def _widen_f32(b: Builder, base: Value, at: int) -> Value:
    return load(b, base, at, _FLOATS)


#: The loop of every weight format, and of ``f16``, laid out as ``bf16``, for keys and values.
LOOPS: dict[str, Loop] = {
    "q4_0": _Q4("q4_0"),
    "q8_0": _Q8("q8_0"),
    "bf16": _Floats(2, _widen_bf16),
    "f16": _Floats(2, _widen_f16),
    "f32": _Floats(4, _widen_f32),
}


class _Kept:
    """Float vectors that stay in memory: LLVM would spill them at worse places."""

    def __init__(self, b: Builder, count: int) -> None:
        self._builder = b
        self._slots = [b.alloca(_FLOATS) for _ in range(count)]
        shown = ir.FunctionType(ir.VoidType(), [_FLOATS.as_pointer()])
        for at, slot in enumerate(self._slots):
            slot.align = BITS // 8
            self.set(at, const(_FLOATS, 0.0))
            b.asm(shown, "", "r,~{memory}", [slot], side_effect=True)

    def get(self, at: int) -> Value:
        return self._builder.load(self._slots[at], typ=_FLOATS)

    def set(self, at: int, value: Value) -> None:
        self._builder.store(value, self._slots[at])


def code_offset(fmt: str) -> int:
    """What the micro-kernel shifts a format's codes by; activations carry its product."""
    return loop_of(fmt).offset


def loop_of(fmt: str) -> Loop:
    if fmt not in LOOPS:
        raise BackendError(f"the kernels of {LEVEL} do not know the weight format {fmt!r}")
    return LOOPS[fmt]
