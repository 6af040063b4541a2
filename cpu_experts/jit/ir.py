"""LLVM IR that intrinsics are put together from: memory, vectors, loops.

Addresses are byte pointers, offsets are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()

Value = Any
Builder = Any


def call(b: Builder, name: str, result: Any, args: list[Value]) -> Value:
    """Call a function of this name: LLVM's own or a library's."""
    fn_type = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, fn_type, name), args)


def splat(b: Builder, value: Value, vector: Any) -> Value:
    """A vector of one value."""
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def const(vector: Any, value: float) -> Value:
    """A vector of one constant."""
    return ir.Constant(vector, [value] * vector.count)


def gep(b: Builder, base: Value, offset: Value | int) -> Value:
    """The address ``offset`` bytes behind ``base``."""
    at = ir.Constant(I64, offset) if isinstance(offset, int) else offset
    return b.gep(base, [at], source_etype=I8)


def load(b: Builder, base: Value, offset: Value | int, kind: Any) -> Value:
    """Read a value that need not be aligned."""
    pointer = b.bitcast(gep(b, base, offset), kind.as_pointer())
    value = b.load(pointer, typ=kind)
    value.align = 1
    return value


def store(b: Builder, value: Value, base: Value, offset: Value | int) -> None:
    """Write a value that need not be aligned."""
    pointer = b.bitcast(gep(b, base, offset), value.type.as_pointer())
    b.store(value, pointer).align = 1


def prefetch(b: Builder, base: Value, offset: int) -> None:
    """Ask for a cache line that is read soon."""
    args = [gep(b, base, offset), *(ir.Constant(I32, n) for n in (0, 3, 1))]
    call(b, "llvm.prefetch.p0", ir.VoidType(), args)


def loop(b: Builder, count: Value, state: list[Value], body: Callable[..., list[Value]]) -> Any:
    """Emit ``for i in range(count): state = body(i, *state)`` for count >= 1."""
    before = b.block
    block, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(block)
    b.position_at_end(block)
    i = b.phi(I64)
    phis = [b.phi(value.type) for value in state]
    results = body(i, *phis)
    following = b.add(i, ir.Constant(I64, 1))
    b.cbranch(b.icmp_signed("<", following, count), block, after)
    i.add_incoming(ir.Constant(I64, 0), before)
    i.add_incoming(following, b.block)
    for phi, start, result in zip(phis, state, results, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(result, b.block)
    b.position_at_end(after)
    return results


def data(context: Any, b: Builder, array_type: Any, array: Value) -> Value:
    """The address of a numba array's content."""
    content = context.make_array(array_type)(context, b, array).data
    return b.bitcast(content, I8.as_pointer())


def floats_at(context: Any, b: Builder, kind: Any, array: Value, at: Value) -> Value:
    """The address of element ``at`` of an array of four-byte numbers."""
    return gep(b, data(context, b, kind, array), b.mul(at, ir.Constant(I64, 4)))
