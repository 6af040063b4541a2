"""Vector code that numba cannot write, as LLVM IR: the micro-kernels.

One micro-kernel does all the arithmetic: a strip of 16 weight rows times ``n`` activation rows
(:func:`strip_dot`). It is emitted once per format, level and ``n``, around the loops of
:mod:`cpu_experts.kernels.simd_loops`.

Activation rows for the quantized formats are ``ACT_GROUP`` = 44 bytes a group of 32: 32 int8
codes, a float32 scale, and two words of sums of the codes, by which a format makes up for what its
own codes are shifted by, or multiplies its minima (:func:`quantize_group`).
"""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.jit.ir import (
    F32,
    I8,
    I32,
    I64,
    Builder,
    Value,
    call,
    const,
    data,
    floats_at,
    gep,
    load,
    splat,
    store,
)
from cpu_experts.kernels.calling import declare, operands
from cpu_experts.kernels.simd_loops import AS_FLOATS, BY_HALVES, SCALE_AT, SUMS_AT, loop_of
from cpu_experts.kernels.vectors import LANES, PARTS, SHIFT, SHIFT_BITS
from hybrid.formats.groups import TINY
from hybrid.formats.strips import GROUP, TILE


def strip_dot(fmt: str, n: int) -> Any:
    """Return the micro-kernel of a format for ``n`` activation rows as a numba intrinsic.

    ``dot(w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at)`` multiplies the strip
    that starts at byte ``w_at`` of ``w`` with the activation rows ``rows[rows_at : rows_at + n]``,
    each ``stride`` bytes in ``act``, over ``inner`` units, and writes float32
    ``[n, 16]`` at ``out[out_at:]``. ``inner`` is at least 1. What is read next begins at byte
    ``then_at``: quantized weights are prefetched across that seam, since a strip of 7 KB is over
    before prefetching has paid.
    """

    @intrinsic
    def dot(typingctx, w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at):
        def codegen(context, b, signature, args):
            found = micro_kernel(context, b, fmt, n)
            b.call(found, operands(context, b, signature.args, args))
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(w, i64, i64, act, i64, rows, i64, i64, out, i64), codegen

    return dot


def micro_kernel(context: Any, b: Builder, fmt: str, n: int) -> Any:
    """Emit a format's micro-kernel for ``n`` rows into the module that ``b`` writes, once."""
    name, module = f"strip_dot_{fmt}_{n}", b.module
    if name in module.globals:
        return module.globals[name]
    function = declare(module, name)
    weights, then, base, stride, index, inner, target = function.args
    b = ir.IRBuilder(function.append_basic_block())
    acts = []
    for t in range(n):
        row = b.sext(load(b, index, 4 * t, I32), I64)
        acts.append(gep(b, base, b.mul(row, stride)))
    sums = loop_of(fmt).emit(b, weights, then, acts, inner)
    for t in range(n):
        for p in range(PARTS):
            store(b, sums[t][p], target, 4 * (t * TILE + p * LANES))
    b.ret_void()
    return function


@intrinsic
def quantize_group(typingctx, x, at, sums, act, act_at):
    """Quantize the 32 float32 at ``x[at:]`` into the activation group at byte ``act_at``.

    ``sums`` says what the two words behind the scale are: ``SHIFT_BITS`` less the sum of all codes
    times a number below 256, as int32, and ``SHIFT_BITS``; with ``BY_HALVES`` the former of each
    half; with ``AS_FLOATS`` the sums themselves times the scale, in float32, take their place.
    Infinite and NaN inputs make the scale infinite or NaN, and so the result NaN.
    """

    def codegen(context, b, signature, args):
        kinds = signature.args
        floats, ints = ir.VectorType(F32, GROUP), ir.VectorType(I32, GROUP)
        v = load(b, floats_at(context, b, kinds[0], args[0], args[1]), 0, floats)
        # As integers, magnitudes order like floats, and NaN is above all of them.
        bits = b.and_(b.bitcast(v, ints), const(ints, 0x7FFFFFFF))
        top = b.bitcast(call(b, f"llvm.vector.reduce.umax.v{GROUP}i32", I32, [bits]), F32)
        some = b.fcmp_unordered(">", top, ir.Constant(F32, TINY))
        inverse = b.fdiv(ir.Constant(F32, 127.0), top)
        inverse = b.select(some, inverse, ir.Constant(F32, 0.0))
        scaled = b.fmul(v, splat(b, inverse, floats))
        # A float below 2^22 in size, rounded (halves to even) in the last bits.
        shifted = b.bitcast(b.fadd(scaled, const(floats, SHIFT)), ints)
        codes = b.sub(shifted, const(ints, SHIFT_BITS))
        target = gep(b, data(context, b, kinds[3], args[3]), args[4])
        store(b, b.trunc(codes, ir.VectorType(I8, GROUP)), target, 0)
        scale = b.fdiv(top, ir.Constant(F32, 127.0))
        store(b, scale, target, SCALE_AT)
        for word, value in enumerate(_sums(b, codes, scale, args[2])):
            store(b, value, target, SUMS_AT + 4 * word)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, types.int32, act, i64), codegen


def _sums(b: Builder, codes: Value, scale: Value, sums: Value) -> list[Value]:
    """The two words of an activation group."""
    half, zero = ir.VectorType(I32, GROUP // 2), ir.Constant(I32, 0)
    found = []
    for first in (0, GROUP // 2):
        mask = ir.Constant(half, list(range(first, first + GROUP // 2)))
        picked = b.shuffle_vector(codes, ir.Constant(codes.type, ir.Undefined), mask)
        found.append(call(b, f"llvm.vector.reduce.add.v{GROUP // 2}i32", I32, [picked]))

    def flag(bit: int) -> Value:
        return b.icmp_signed("!=", b.and_(sums, ir.Constant(I32, bit)), zero)

    halves, factor = flag(BY_HALVES), b.neg(b.and_(sums, ir.Constant(I32, BY_HALVES - 1)))
    floats = flag(AS_FLOATS)
    first = b.select(halves, found[0], b.add(*found))
    second = b.select(halves, found[1], zero)
    words = []
    for total, as_float in ((first, floats), (second, b.and_(floats, halves))):
        scaled = b.bitcast(b.fmul(b.sitofp(total, F32), scale), I32)
        whole = b.add(b.mul(total, factor), ir.Constant(I32, SHIFT_BITS))
        words.append(b.select(as_float, scaled, whole))
    return words
