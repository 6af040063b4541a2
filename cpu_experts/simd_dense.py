"""Vector code for the parts of a decoder that are not products of matrices."""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.formats import TILE
from cpu_experts.simd import _F32, _exp, _floats_at, _load, _splat, _store


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
