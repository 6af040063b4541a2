"""Vector code that numba cannot write: the innermost loops, emitted as LLVM IR.

One micro-kernel does all the arithmetic: a strip of 16 weight rows times ``n`` activation
rows (:func:`strip_dot`). It is emitted once per format, level and ``n``; a level is a vector
width and a way to add up products of 4 neighbouring bytes:

* ``avx512vnni``, ``avxvnni``: ``vpdpbusd`` into int32 lanes, one a row.
* ``avx2``: ``vpmaddubsw`` into int16 lanes, two a row. A group of 32 q4_0 codes cannot
  overflow them (8 steps of at most 2 * 15 * 127, and the start value's wrap-around cancels),
  so one widening a group is enough; q8_0 widens at every step.

``LEVEL-emulated`` is a level's code with its dot product spelled out in ordinary
instructions: slow, and there to check a level on a machine that lacks it.

Activation rows for the quantized formats are ``ACT_GROUP`` = 40 bytes a group of 32: 32 int8
codes, a float32 scale, and a start value that folds the weights' offset (-8 times the sum of
the codes for q4_0) into the accumulator.
"""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_experts.formats import ACT_GROUP, GROUP, TILE, TINY
from cpu_experts.jit import hostcpu

PREFETCH_BYTES = 2048
#: Added to a float32 below 2^22 in size, leaves it rounded (halves to even) in the last bits.
ROUNDER, _ROUNDER_BITS = 1.5 * 2.0**23, 0x4B400000

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()

Value = Any
Builder = Any


LEVEL, EMULATED = hostcpu.processor().level, hostcpu.processor().emulated
#: How many activation rows the micro-kernel takes at once: by the wide, the middle and the
#: one-row variant.
ROW_BLOCKS = {"avx512vnni": (12, 4, 1)}.get(LEVEL, (4, 2, 1))

_BITS = 512 if LEVEL == "avx512vnni" else 256
_LANES = _BITS // 32
_PARTS = TILE // _LANES
_REGISTERS = 32 if _BITS == 512 else 16
_BYTES = ir.VectorType(_I8, 4 * _LANES)
_WORDS = ir.VectorType(_I16, 2 * _LANES)
_INTS = ir.VectorType(_I32, _LANES)
_FLOATS = ir.VectorType(_F32, _LANES)
_HALVES = ir.VectorType(ir.HalfType(), _LANES)
#: Bytes of a weight in the formats without groups.
_FLOAT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


def _call(b: Builder, name: str, result: Any, args: list[Value]) -> Value:
    fn_type = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, fn_type, name), args)


def _splat(b: Builder, value: Value, vector: Any) -> Value:
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _const(vector: Any, value: float) -> Value:
    return ir.Constant(vector, [value] * vector.count)


def _fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return _call(b, f"llvm.fma.v{_LANES}f32", _FLOATS, [x, y, z])


def _pin(b: Builder, value: Value) -> Value:
    """Fix the order of what comes before and after: an empty instruction LLVM cannot see into."""
    if EMULATED:  # the vector may be wider than this processor's registers
        return value
    fn_type = ir.FunctionType(value.type, [value.type])
    return b.asm(fn_type, "", "=x,0", [value], side_effect=True)


def _gep(b: Builder, base: Value, offset: Value | int) -> Value:
    at = ir.Constant(_I64, offset) if isinstance(offset, int) else offset
    return b.gep(base, [at], source_etype=_I8)


def _load(b: Builder, base: Value, offset: Value | int, kind: Any) -> Value:
    pointer = b.bitcast(_gep(b, base, offset), kind.as_pointer())
    value = b.load(pointer, typ=kind)
    value.align = 1
    return value


def _store(b: Builder, value: Value, base: Value, offset: Value | int) -> None:
    pointer = b.bitcast(_gep(b, base, offset), value.type.as_pointer())
    b.store(value, pointer).align = 1


def _prefetch(b: Builder, base: Value, offset: int) -> None:
    args = [_gep(b, base, offset), *(ir.Constant(_I32, n) for n in (0, 3, 1))]
    _call(b, "llvm.prefetch.p0", ir.VoidType(), args)


def _loop(b: Builder, count: Value, state: list[Value], body: Callable[..., list[Value]]) -> Any:
    """Emit ``for i in range(count): state = body(i, *state)`` for count >= 1."""
    before = b.block
    block, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(block)
    b.position_at_end(block)
    i = b.phi(_I64)
    phis = [b.phi(value.type) for value in state]
    results = body(i, *phis)
    following = b.add(i, ir.Constant(_I64, 1))
    b.cbranch(b.icmp_signed("<", following, count), block, after)
    i.add_incoming(ir.Constant(_I64, 0), before)
    i.add_incoming(following, b.block)
    for phi, start, result in zip(phis, state, results, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(result, b.block)
    b.position_at_end(after)
    return results


class _Dot:
    """Sums of 4 neighbouring products, weight bytes times activation bytes, a lane a row."""

    def __init__(self, fmt: str) -> None:
        self.fmt = fmt
        #: q8_0 weights are signed, which vpdpbusd's first operand is not: shift them by 128.
        self.shifted = fmt == "q8_0" and LEVEL != "avx2"
        self.pairs = fmt == "q4_0" and LEVEL == "avx2"

    def start(self, b: Builder, packed: Value) -> Value:
        """Accumulator from the activation group's start value."""
        lanes = _splat(b, packed, _INTS)
        return b.bitcast(lanes, _WORDS) if self.pairs else lanes

    def codes(self, b: Builder, base: Value, step: int) -> list[Value]:
        """Weight bytes of 4 inputs: of q4_0 a chunk's low nibbles, then its high ones."""
        chunk = step // 2 if self.fmt == "q4_0" else step
        raw = [_load(b, base, 64 * chunk + p * _BITS // 8, _BYTES) for p in range(_PARTS)]
        if self.shifted:
            return [b.xor(v, _const(_BYTES, 0x80)) for v in raw]
        if self.fmt == "q8_0":
            return raw
        if step % 2:
            four = _const(_WORDS, 4)
            raw = [b.bitcast(b.lshr(b.bitcast(v, _WORDS), four), _BYTES) for v in raw]
        return [b.and_(v, _const(_BYTES, 15)) for v in raw]

    def inputs(self, step: int) -> int:
        """Where the 4 activation bytes of a step lie in the group."""
        return 4 * (step // 2) + 16 * (step % 2) if self.fmt == "q4_0" else 4 * step

    def step(self, b: Builder, acc: Value, w: Value, x: Value) -> Value:
        """Add one chunk: ``w`` bytes, ``x`` the same 4 activation bytes in every lane."""
        if EMULATED:
            return self._emulated(b, acc, w, b.bitcast(x, _BYTES))
        if LEVEL != "avx2":
            return _call(
                b,
                f"llvm.x86.avx512.vpdpbusd.{_BITS}",
                _INTS,
                [acc, b.bitcast(w, _INTS), x],
            )
        if self.pairs:
            return b.add(acc, self._madd_bytes(b, w, b.bitcast(x, _BYTES)))
        no_poison = ir.Constant(ir.IntType(1), 0)
        size = _call(b, "llvm.abs.v32i8", _BYTES, [w, no_poison])
        signed = _call(b, "llvm.x86.avx2.psign.b", _BYTES, [b.bitcast(x, _BYTES), w])
        return b.add(acc, self._madd_words(b, self._madd_bytes(b, size, signed)))

    def total(self, b: Builder, acc: Value) -> Value:
        """The accumulator as float32, one lane a row."""
        if self.pairs:
            if EMULATED:
                low = b.ashr(b.shl(b.bitcast(acc, _INTS), _const(_INTS, 16)), _const(_INTS, 16))
                acc = b.add(low, b.ashr(b.bitcast(acc, _INTS), _const(_INTS, 16)))
            else:
                acc = self._madd_words(b, acc)
        return b.sitofp(acc, _FLOATS)

    @staticmethod
    def _madd_bytes(b: Builder, unsigned: Value, signed: Value) -> Value:
        return _call(b, "llvm.x86.avx2.pmadd.ub.sw", _WORDS, [unsigned, signed])

    @staticmethod
    def _madd_words(b: Builder, words: Value) -> Value:
        return _call(b, "llvm.x86.avx2.pmadd.wd", _INTS, [words, _const(_WORDS, 1)])

    def _emulated(self, b: Builder, acc: Value, w: Value, x: Value) -> Value:
        lane, extend = (_I16, 2) if self.pairs else (_I32, 4)
        signed_w = self.fmt == "q8_0" and not self.shifted
        wide = ir.VectorType(lane, 4 * _LANES)
        products = b.mul(b.sext(w, wide) if signed_w else b.zext(w, wide), b.sext(x, wide))
        for at in range(extend):
            picks = ir.Constant(
                ir.VectorType(_I32, 4 * _LANES // extend),
                [extend * i + at for i in range(4 * _LANES // extend)],
            )
            acc = b.add(acc, b.shuffle_vector(products, ir.Constant(wide, ir.Undefined), picks))
        return acc


def _quantized_dot(
    b: Builder, fmt: str, w: Value, then: Value, acts: list[Value], groups: Value
) -> list[list[Value]]:
    """Emit the loop over groups; returns the sums ``[n][parts]`` as float vectors."""
    dot = _Dot(fmt)
    n = len(acts)
    size = 288 if fmt == "q4_0" else 544
    # What is read next lies behind this strip or elsewhere: that is where prefetching goes on.
    whole = b.mul(groups, ir.Constant(_I64, size))
    end, early = _gep(b, w, whole), ir.Constant(_I64, -(-PREFETCH_BYTES // size) * size)
    short = b.icmp_signed("<", early, whole)
    begin = b.select(short, _gep(b, w, early), _gep(b, then, b.sub(early, whole)))
    # Where accumulators and sums together are more than registers, the sums lie in memory:
    # they are needed once a group.
    kept = _Kept(b, n * _PARTS) if 2 * n * _PARTS + 4 > _REGISTERS else None

    def body(g: Value, early: Value, *sums: Value) -> list[Value]:
        base = _gep(b, w, b.mul(g, ir.Constant(_I64, size)))
        rows = [_gep(b, act, b.mul(g, ir.Constant(_I64, ACT_GROUP))) for act in acts]
        for line in range(0, size, 64):
            _prefetch(b, early, line)
        early = _gep(b, early, size)
        early = b.select(b.icmp_unsigned("==", early, end), then, early)
        accs = [[dot.start(b, _load(b, row, GROUP + 4, _I32))] * _PARTS for row in rows]
        for step in range(GROUP // 4):
            # Step by step, so that two vectors of codes at a time take registers.
            codes = dot.codes(b, base, step)
            for t in range(n):
                x = _splat(b, _load(b, rows[t], dot.inputs(step), _I32), _INTS)
                for p in range(_PARTS):
                    accs[t][p] = dot.step(b, accs[t][p], codes[p], x)
            accs = [[_pin(b, acc) for acc in row] for row in accs]
        scales = [
            b.fpext(_load(b, base, size - 2 * TILE + 2 * _LANES * p, _HALVES), _FLOATS)
            for p in range(_PARTS)
        ]
        out = [early]
        for t in range(n):
            scale = _splat(b, _load(b, rows[t], GROUP, _F32), _FLOATS)
            for p in range(_PARTS):
                at = t * _PARTS + p
                factor, total = b.fmul(scale, scales[p]), dot.total(b, accs[t][p])
                if kept is None:
                    out.append(_fma(b, total, factor, sums[at]))
                else:
                    kept.set(at, _fma(b, total, factor, kept.get(at)))
        return out

    zeros = [_const(_FLOATS, 0.0)] * (n * _PARTS)
    sums = _loop(b, groups, [begin, *(zeros if kept is None else [])], body)[1:]
    if kept is not None:
        sums = [kept.get(at) for at in range(n * _PARTS)]
    return [sums[t * _PARTS : (t + 1) * _PARTS] for t in range(n)]


class _Kept:
    """Float vectors that stay in memory: LLVM would spill them at worse places."""

    def __init__(self, b: Builder, count: int) -> None:
        self._builder = b
        self._slots = [b.alloca(_FLOATS) for _ in range(count)]
        shown = ir.FunctionType(ir.VoidType(), [_FLOATS.as_pointer()])
        for at, slot in enumerate(self._slots):
            slot.align = _BITS // 8
            self.set(at, _const(_FLOATS, 0.0))
            b.asm(shown, "", "r,~{memory}", [slot], side_effect=True)

    def get(self, at: int) -> Value:
        return self._builder.load(self._slots[at], typ=_FLOATS)

    def set(self, at: int, value: Value) -> None:
        self._builder.store(value, self._slots[at])


def _float_dot(
    b: Builder, fmt: str, w: Value, then: Value, acts: list[Value], cols: Value
) -> list[list[Value]]:
    """Emit the loop over single inputs for f16, bf16 and f32 weights."""
    size = _FLOAT_BYTES[fmt]

    def body(k: Value, *sums: Value) -> list[Value]:
        base = _gep(b, w, b.mul(k, ir.Constant(_I64, TILE * size)))
        _prefetch(b, base, PREFETCH_BYTES)
        weights = []
        for p in range(_PARTS):
            at = size * _LANES * p
            if fmt == "bf16":
                bits = b.zext(_load(b, base, at, ir.VectorType(_I16, _LANES)), _INTS)
                weights.append(b.bitcast(b.shl(bits, _const(_INTS, 16)), _FLOATS))
            elif fmt == "f16":
                weights.append(b.fpext(_load(b, base, at, _HALVES), _FLOATS))
            else:
                weights.append(_load(b, base, at, _FLOATS))
        out = []
        for t, act in enumerate(acts):
            x = _splat(b, _load(b, act, b.mul(k, ir.Constant(_I64, 4)), _F32), _FLOATS)
            for p in range(_PARTS):
                out.append(_fma(b, weights[p], x, sums[t * _PARTS + p]))
        return out

    sums = _loop(b, cols, [_const(_FLOATS, 0.0)] * (len(acts) * _PARTS), body)
    return [sums[t * _PARTS : (t + 1) * _PARTS] for t in range(len(acts))]


def _data(context: Any, b: Builder, array_type: Any, array: Value) -> Value:
    data = context.make_array(array_type)(context, b, array).data
    return b.bitcast(data, _I8.as_pointer())


def strip_dot(fmt: str, n: int) -> Any:
    """Return the micro-kernel for ``n`` activation rows as a numba intrinsic.

    ``dot(w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at)`` multiplies the strip
    that starts at byte ``w_at`` of ``w`` with the activation rows ``rows[rows_at : rows_at + n]``,
    each ``stride`` bytes in ``act``, over ``inner`` groups (inputs for floats), and writes float32
    ``[n, 16]`` at ``out[out_at:]``. ``inner`` is at least 1. What is read next begins at byte
    ``then_at``: quantized weights are prefetched across that seam, since a strip of 7 KB is over
    before prefetching has paid. Besides the weight formats there is ``f16``, laid out as
    ``bf16``, for keys and values.
    """

    @intrinsic
    def dot(typingctx, w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at):
        def codegen(context, b, signature, args):
            kinds = signature.args
            weights = _gep(b, _data(context, b, kinds[0], args[0]), args[1])
            then = _gep(b, _data(context, b, kinds[0], args[0]), args[2])
            base = _data(context, b, kinds[3], args[3])
            index = _floats_at(context, b, kinds[5], args[5], args[6])
            target = _floats_at(context, b, kinds[8], args[8], args[9])
            function = _micro_kernel(b.module, fmt, n)
            b.call(function, [weights, then, base, args[4], index, args[7], target])
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(w, i64, i64, act, i64, rows, i64, i64, out, i64), codegen

    return dot


def _micro_kernel(module: Any, fmt: str, n: int) -> Any:
    """Emit the micro-kernel into a module once, as a function that stays one.

    Copies of it at every call would make the compiler's work several times longer.
    """
    name = f"strip_dot_{fmt}_{n}"
    if name in module.globals:
        return module.globals[name]
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, pointer, _I64, pointer, _I64, pointer])
    function = ir.Function(module, kind, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    weights, then, base, stride, index, inner, target = function.args
    b = ir.IRBuilder(function.append_basic_block())
    acts = []
    for t in range(n):
        row = b.sext(_load(b, index, 4 * t, _I32), _I64)
        acts.append(_gep(b, base, b.mul(row, stride)))
    emit = _float_dot if fmt in _FLOAT_BYTES else _quantized_dot
    sums = emit(b, fmt, weights, then, acts, inner)
    for t in range(n):
        for p in range(_PARTS):
            _store(b, sums[t][p], target, 4 * (t * TILE + p * _LANES))
    b.ret_void()
    return function


def _floats_at(context: Any, b: Builder, kind: Any, array: Value, at: Value) -> Value:
    return _gep(b, _data(context, b, kind, array), b.mul(at, ir.Constant(_I64, 4)))


@intrinsic
def quantize_group(typingctx, x, at, offset, act, act_at):
    """Quantize the 32 float32 at ``x[at:]`` into the activation group at byte ``act_at``.

    ``offset`` is what the weights' codes are shifted by (8, 128 or 0). Infinite and NaN
    inputs make the scale infinite or NaN, and so the result NaN.
    """

    def codegen(context, b, signature, args):
        kinds = signature.args
        floats, ints = ir.VectorType(_F32, GROUP), ir.VectorType(_I32, GROUP)
        v = _load(b, _floats_at(context, b, kinds[0], args[0], args[1]), 0, floats)
        # As integers, magnitudes order like floats, and NaN is above all of them.
        bits = b.and_(b.bitcast(v, ints), _const(ints, 0x7FFFFFFF))
        top = b.bitcast(_call(b, f"llvm.vector.reduce.umax.v{GROUP}i32", _I32, [bits]), _F32)
        some = b.fcmp_unordered(">", top, ir.Constant(_F32, TINY))
        inverse = b.fdiv(ir.Constant(_F32, 127.0), top)
        inverse = b.select(some, inverse, ir.Constant(_F32, 0.0))
        scaled = b.fmul(v, _splat(b, inverse, floats))
        shifted = b.bitcast(b.fadd(scaled, _const(floats, ROUNDER)), ints)
        codes = b.sub(shifted, _const(ints, _ROUNDER_BITS))
        target = _gep(b, _data(context, b, kinds[3], args[3]), args[4])
        _store(b, b.trunc(codes, ir.VectorType(_I8, GROUP)), target, 0)
        _store(b, b.fdiv(top, ir.Constant(_F32, 127.0)), target, GROUP)
        half = ir.VectorType(_I32, GROUP // 2)
        sums = []
        for first in (0, 2):  # the two int16 lanes of a row add up inputs 0, 1 and 2, 3 of 4
            at = [4 * i + first + j for i in range(GROUP // 4) for j in range(2)]
            mask = ir.Constant(half, at)
            picked = b.shuffle_vector(codes, ir.Constant(ints, ir.Undefined), mask)
            total = _call(b, f"llvm.vector.reduce.add.v{GROUP // 2}i32", _I32, [picked])
            sums.append(b.mul(total, b.neg(args[2])))
        if LEVEL == "avx2":
            low = b.and_(sums[0], ir.Constant(_I32, 0xFFFF))
            start = b.or_(low, b.shl(sums[1], ir.Constant(_I32, 16)))
        else:
            start = b.add(*sums)
        _store(b, start, target, GROUP + 4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, types.int32, act, i64), codegen
