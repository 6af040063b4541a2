"""Vector code for what is not a product: strips of 16, exponents, half precision, plain reads."""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import functools
import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_experts.jit.ir import (
    F16,
    F32,
    I16,
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
    loop,
    splat,
    store,
)
from cpu_experts.kernels.vectors import BITS, SHIFT
from hybrid.formats.strips import TILE

#: Words (uint64) that :func:`sum_words` takes at a time, and sums that it keeps of them.
READ_WORDS, _SUMS = 64, 8


def _exp(b: Builder, x: Value) -> Value:
    """e^x to float32 rounding: 2^n times a polynomial on [-ln2/2, ln2/2]."""
    kind = x.type
    ints = ir.VectorType(I32, kind.count)
    low, high = const(kind, -87.0), const(kind, 89.0)  # 2^128 is infinite
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    x = b.select(b.fcmp_ordered(">", x, high), high, x)

    def fma(x: Value, y: Value | float, z: Value | float) -> Value:
        y, z = (const(kind, v) if isinstance(v, float) else v for v in (y, z))
        return call(b, f"llvm.fma.v{kind.count}f32", kind, [x, y, z])

    shifted = fma(x, 1.4426950408889634, SHIFT)
    n = b.fsub(shifted, const(kind, SHIFT))
    r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x))
    poly = const(kind, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        poly = fma(poly, r, c)
    poly = b.fadd(fma(b.fmul(poly, r), r, r), const(kind, 1.0))
    # The last bits of ``shifted`` are n; what is above them leaves with the shift.
    whole = b.add(b.bitcast(shifted, ints), const(ints, 127))
    return b.fmul(poly, b.bitcast(b.shl(whole, const(ints, 23)), kind))


@intrinsic
def silu_strip(typingctx, gate, at, alpha, out, out_at):
    """Write ``g * sigmoid(alpha * g)`` for the 16 float32 at ``gate[at:]`` to ``out[out_at:]``."""

    def codegen(context, b, signature, args):
        kinds = signature.args
        vector = ir.VectorType(F32, TILE)
        g = load(b, floats_at(context, b, kinds[0], args[0], args[1]), 0, vector)
        e = _exp(b, b.fmul(g, b.fneg(splat(b, args[2], vector))))
        y = b.fdiv(g, b.fadd(e, const(vector, 1.0)))
        store(b, y, floats_at(context, b, kinds[3], args[3], args[4]), 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(gate, i64, types.float32, out, i64), codegen


def _strip(context: Any, b: Builder, kind: Any, array: Value, at: Value) -> tuple[Value, Value]:
    """Address and content of the 16 float32 at ``array[at:]``."""
    pointer = floats_at(context, b, kind, array, at)
    return pointer, load(b, pointer, 0, ir.VectorType(F32, TILE))


@intrinsic
def add_strip(typingctx, x, at, scale, out, out_at):
    """Add ``scale`` times the 16 float32 at ``x[at:]`` to those at ``out[out_at:]``."""

    def codegen(context, b, signature, args):
        _, values = _strip(context, b, signature.args[0], args[0], args[1])
        target, sums = _strip(context, b, signature.args[3], args[3], args[4])
        scaled = b.fmul(values, splat(b, args[2], values.type))
        store(b, b.fadd(sums, scaled), target, 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, types.float32, out, i64), codegen


@intrinsic
def multiply_strip(typingctx, x, at, y, y_at, offset):
    """Multiply the 16 float32 at ``x[at:]`` by those at ``y[y_at:]`` plus ``offset``."""

    def codegen(context, b, signature, args):
        target, values = _strip(context, b, signature.args[0], args[0], args[1])
        _, factors = _strip(context, b, signature.args[2], args[2], args[3])
        factors = b.fadd(factors, splat(b, args[4], factors.type))
        store(b, b.fmul(values, factors), target, 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, y, i64, types.float32), codegen


@intrinsic
def copy_strip(typingctx, x, at, out, out_at):
    """Copy the 16 float32 at ``x[at:]`` to ``out[out_at:]``."""

    def codegen(context, b, signature, args):
        _, values = _strip(context, b, signature.args[0], args[0], args[1])
        store(b, values, floats_at(context, b, signature.args[2], args[2], args[3]), 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, out, i64), codegen


@intrinsic
def largest_of(typingctx, x, at, count):
    """Return the largest of the ``count`` float32 at ``x[at:]``, a positive multiple of 16."""

    def codegen(context, b, signature, args):
        vector = ir.VectorType(F32, TILE)
        pointer = floats_at(context, b, signature.args[0], args[0], args[1])

        def body(i: Value, most: Value) -> list[Value]:
            values = load(b, pointer, b.mul(i, ir.Constant(I64, 4 * TILE)), vector)
            return [b.select(b.fcmp_ordered(">", values, most), values, most)]

        strips = b.udiv(args[2], ir.Constant(I64, TILE))
        (most,) = loop(b, strips, [const(vector, -math.inf)], body)
        return call(b, f"llvm.vector.reduce.fmax.v{TILE}f32", F32, [most])

    return types.float32(x, types.int64, types.int64), codegen


@intrinsic
def exp_all(typingctx, x, at, count, shift):
    """Replace the ``count`` float32 at ``x[at:]`` by ``exp(x - shift)``; return their sum.

    ``count`` is a positive multiple of 16.
    """

    def codegen(context, b, signature, args):
        vector = ir.VectorType(F32, TILE)
        pointer = floats_at(context, b, signature.args[0], args[0], args[1])
        shifts = splat(b, args[3], vector)

        def body(i: Value, total: Value) -> list[Value]:
            offset = b.mul(i, ir.Constant(I64, 4 * TILE))
            values = _exp(b, b.fsub(load(b, pointer, offset, vector), shifts))
            store(b, values, pointer, offset)
            return [b.fadd(total, values)]

        strips = b.udiv(args[2], ir.Constant(I64, TILE))
        (total,) = loop(b, strips, [const(vector, 0.0)], body)
        add = ir.FunctionType(F32, [F32, vector])
        name = f"llvm.vector.reduce.fadd.v{TILE}f32"
        reduce = cgutils.get_or_insert_function(b.module, add, name)
        return b.call(reduce, [ir.Constant(F32, 0.0), total], fastmath=["reassoc"])

    return types.float32(x, types.int64, types.int64, types.float32), codegen


@intrinsic
def to_half(typingctx, x):
    """Return the bits (uint16) of a float32 rounded to half precision, halves to even."""

    def codegen(context, b, signature, args):
        return b.bitcast(b.fptrunc(args[0], F16), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def sum_words(typingctx, words, at, count):
    """Return the sum (uint64) of the ``count`` uint64 at ``words[at:]``.

    ``count`` is a positive multiple of ``READ_WORDS``. Reads whole vectors, as the micro-kernels
    do; in so plain a stream the processor looks ahead by itself.
    """

    def codegen(context, b, signature, args):
        vector = ir.VectorType(I64, BITS // 64)
        start = b.mul(args[1], ir.Constant(I64, 8))
        pointer = gep(b, data(context, b, signature.args[0], args[0]), start)

        def body(i: Value, *sums: Value) -> list[Value]:
            found = list(sums)
            base = gep(b, pointer, b.mul(i, ir.Constant(I64, 8 * READ_WORDS)))
            for n in range(64 * READ_WORDS // BITS):
                read = load(b, base, n * BITS // 8, vector)
                found[n % _SUMS] = b.add(found[n % _SUMS], read)
            return found

        steps = b.udiv(args[2], ir.Constant(I64, READ_WORDS))
        sums = loop(b, steps, [const(vector, 0)] * _SUMS, body)
        total = functools.reduce(b.add, sums)
        return call(b, f"llvm.vector.reduce.add.v{vector.count}i64", I64, [total])

    return types.uint64(words, types.int64, types.int64), codegen
