"""How micro-kernels are called: seven numbers and addresses, whoever made their code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_experts.jit.ir import I8, I64, Builder, Value, data, floats_at, gep

_POINTER = I8.as_pointer()
#: Strip, what is read next, activations, their stride, the rows' numbers, units, where sums go.
MICRO_KERNEL = ir.FunctionType(
    ir.VoidType(), [_POINTER, _POINTER, _POINTER, I64, _POINTER, I64, _POINTER]
)


def operands(context: Any, b: Builder, kinds: Any, args: Any) -> list[Value]:
    """What a micro-kernel takes, of ``w, w_at, then_at, act, stride, rows, rows_at, inner, out``
    and ``out_at``."""
    return [
        gep(b, data(context, b, kinds[0], args[0]), args[1]),
        gep(b, data(context, b, kinds[0], args[0]), args[2]),
        data(context, b, kinds[3], args[3]),
        args[4],
        floats_at(context, b, kinds[5], args[5], args[6]),
        args[7],
        floats_at(context, b, kinds[8], args[8], args[9]),
    ]


def declare(module: Any, name: str) -> Any:
    """A new micro-kernel of a module, one function however often it is called.

    Copies of it at every call would make the compiler's work several times longer.
    """
    function = ir.Function(module, MICRO_KERNEL, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    return function
