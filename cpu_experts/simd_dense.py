"""Vector code for what is not a product of matrices: exponents."""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.formats import TILE
from cpu_experts.simd import (
    _F32,
    _I32,
    Builder,
    Value,
    _call,
    _const,
    _floats_at,
    _load,
    _splat,
    _store,
)


def _exp(b: Builder, x: Value) -> Value:
    """e^x to float32 rounding: 2^n times a polynomial on [-ln2/2, ln2/2]."""
    kind = x.type
    lanes = kind.count
    ints = ir.VectorType(_I32, lanes)
    low, high = _const(kind, -87.0), _const(kind, 89.0)  # 2^128 is infinite
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    x = b.select(b.fcmp_ordered(">", x, high), high, x)
    n = _call(b, f"llvm.rint.v{lanes}f32", kind, [b.fmul(x, _const(kind, 1.4426950408889634))])
    r = b.fsub(x, b.fmul(n, _const(kind, 0.693359375)))
    r = b.fadd(r, b.fmul(n, _const(kind, 2.12194440e-4)))
    poly = _const(kind, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        poly = b.fadd(b.fmul(poly, r), _const(kind, c))
    poly = b.fadd(b.fadd(b.fmul(b.fmul(poly, r), r), r), _const(kind, 1.0))
    whole = _call(b, f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32", ints, [n])
    return b.fmul(poly, b.bitcast(b.shl(b.add(whole, _const(ints, 127)), _const(ints, 23)), kind))


@intrinsic
def silu_strip(typingctx, gate, at, alpha, out, out_at):
    """Write ``g * sigmoid(alpha * g)`` for the 16 float32 at ``gate[at:]`` to ``out[out_at:]``."""

    def codegen(context, b, signature, args):
        kinds = signature.args
        vector = ir.VectorType(_F32, TILE)
        g = _load(b, _floats_at(context, b, kinds[0], args[0], args[1]), 0, vector)
        e = _exp(b, b.fmul(g, b.fneg(_splat(b, args[2], vector))))
        y = b.fdiv(g, b.fadd(e, _const(vector, 1.0)))
        _store(b, y, _floats_at(context, b, kinds[3], args[3], args[4]), 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(gate, i64, types.float32, out, i64), codegen


@intrinsic
def exp_strip(typingctx, x, at, shift):
    """Replace the 16 float32 at ``x[at:]`` by their ``exp(x - shift)``."""

    def codegen(context, b, signature, args):
        vector = ir.VectorType(_F32, TILE)
        pointer = _floats_at(context, b, signature.args[0], args[0], args[1])
        values = b.fsub(_load(b, pointer, 0, vector), _splat(b, args[2], vector))
        _store(b, _exp(b, values), pointer, 0)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32), codegen
