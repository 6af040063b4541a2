"""Vector code that numba cannot write, as LLVM IR: the micro-kernels.

One micro-kernel does all the arithmetic: a strip of 16 weight rows times ``n`` activation rows
(:func:`strip_dot`). It is emitted once per format, level and ``n``, around the loops of
:mod:`cpu_experts.kernels.simd_loops`.

Activation rows for the quantized formats are ``ACT_GROUP`` = 40 bytes a group of 32: 32 int8
codes, a float32 scale, and a start value that folds the weights' offset (-8 times the sum of
the codes for q4_0) into the accumulator.
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
from cpu_experts.jit.simd_level import LEVEL
from cpu_experts.kernels.simd_loops import LANES, LOOPS, PARTS, loop_of
from hybrid.formats.groups import TINY
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import GROUP, TILE

#: Added to a float32 below 2^22 in size, leaves it rounded (halves to even) in the last bits.
ROUNDER, _ROUNDER_BITS = 1.5 * 2.0**23, 0x4B400000


def strip_dot(fmt: str, n: int) -> Any:
    """Return the micro-kernel of a format for ``n`` activation rows as a numba intrinsic.

    ``dot(w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at)`` multiplies the strip
    that starts at byte ``w_at`` of ``w`` with the activation rows ``rows[rows_at : rows_at + n]``,
    each ``stride`` bytes in ``act``, over ``inner`` groups (inputs for floats), and writes float32
    ``[n, 16]`` at ``out[out_at:]``. ``inner`` is at least 1. What is read next begins at byte
    ``then_at``: quantized weights are prefetched across that seam, since a strip of 7 KB is over
    before prefetching has paid.
    """

    @intrinsic
    def dot(typingctx, w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at):
        def codegen(context, b, signature, args):
            operands = _operands(context, b, signature.args, args)
            b.call(_micro_kernel(b.module, fmt, n), operands)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(w, i64, i64, act, i64, rows, i64, i64, out, i64), codegen

    return dot


def strip_dot_of_any(n: int) -> Any:
    """Return what :func:`strip_dot` does, with the number of a registered format in front."""

    @intrinsic
    def dot(typingctx, fmt, w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at):
        def codegen(context, b, signature, args):
            operands = _operands(context, b, signature.args[1:], args[1:])
            done = b.append_basic_block("done")
            *others, last = (known for known in FORMATS.values() if known.name in LOOPS)
            for known in others:
                here, following = b.append_basic_block(known.name), b.append_basic_block("or")
                same = b.icmp_signed("==", args[0], ir.Constant(I64, known.number))
                b.cbranch(same, here, following)
                b.position_at_end(here)
                b.call(_micro_kernel(b.module, known.name, n), operands)
                b.branch(done)
                b.position_at_end(following)
            b.call(_micro_kernel(b.module, last.name, n), operands)
            b.branch(done)
            b.position_at_end(done)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(i64, w, i64, i64, act, i64, rows, i64, i64, out, i64), codegen

    return dot


def _operands(context: Any, b: Builder, kinds: Any, args: Any) -> list[Value]:
    """What a micro-kernel takes, of the arguments of :func:`strip_dot`."""
    return [
        gep(b, data(context, b, kinds[0], args[0]), args[1]),
        gep(b, data(context, b, kinds[0], args[0]), args[2]),
        data(context, b, kinds[3], args[3]),
        args[4],
        floats_at(context, b, kinds[5], args[5], args[6]),
        args[7],
        floats_at(context, b, kinds[8], args[8], args[9]),
    ]


def _micro_kernel(module: Any, fmt: str, n: int) -> Any:
    """Emit the micro-kernel into a module once, as a function that stays one.

    Copies of it at every call would make the compiler's work several times longer.
    """
    name = f"strip_dot_{fmt}_{n}"
    if name in module.globals:
        return module.globals[name]
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, pointer, I64, pointer, I64, pointer])
    function = ir.Function(module, kind, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
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
def quantize_group(typingctx, x, at, offset, act, act_at):
    """Quantize the 32 float32 at ``x[at:]`` into the activation group at byte ``act_at``.

    ``offset`` is what the weights' codes are shifted by (8, 128 or 0). Infinite and NaN
    inputs make the scale infinite or NaN, and so the result NaN.
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
        shifted = b.bitcast(b.fadd(scaled, const(floats, ROUNDER)), ints)
        codes = b.sub(shifted, const(ints, _ROUNDER_BITS))
        target = gep(b, data(context, b, kinds[3], args[3]), args[4])
        store(b, b.trunc(codes, ir.VectorType(I8, GROUP)), target, 0)
        store(b, b.fdiv(top, ir.Constant(F32, 127.0)), target, GROUP)
        half = ir.VectorType(I32, GROUP // 2)
        sums = []
        for first in (0, 2):  # the two int16 lanes of a row add up inputs 0, 1 and 2, 3 of 4
            at = [4 * i + first + j for i in range(GROUP // 4) for j in range(2)]
            mask = ir.Constant(half, at)
            picked = b.shuffle_vector(codes, ir.Constant(ints, ir.Undefined), mask)
            total = call(b, f"llvm.vector.reduce.add.v{GROUP // 2}i32", I32, [picked])
            sums.append(b.mul(total, b.neg(args[2])))
        if LEVEL == "avx2":
            low = b.and_(sums[0], ir.Constant(I32, 0xFFFF))
            start = b.or_(low, b.shl(sums[1], ir.Constant(I32, 16)))
        else:
            start = b.add(*sums)
        store(b, start, target, GROUP + 4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, types.int32, act, i64), codegen
