"""The widest inner loops by themselves: callable from Python, and as machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types

from cpu_experts.jit.addresses import words_at
from cpu_experts.kernels.dots import SIZE, dot, dot_table
from cpu_experts.kernels.micro import ROW_BLOCKS, strip_dot
from hybrid.formats.registry import FORMATS


@njit
def _call(found, w, w_at, act, stride, rows, rows_at, inner, out, out_at):
    dot(found, w, w_at, w_at, act, stride, rows, rows_at, inner, out, out_at)


def strip_caller(fmt: str, n: int) -> Callable[..., None]:
    """A format's micro-kernel for ``n`` rows, found in its table."""
    if fmt not in FORMATS:
        return inlined(fmt, n)
    found = words_at(dot_table(fmt), SIZE)[ROW_BLOCKS.index(n)]
    return lambda *args: _call(found, *args)


def inlined(fmt: str, n: int) -> Any:
    """The same as a part of its caller."""
    dot = strip_dot(fmt, n)

    @njit
    def call(w, w_at, act, stride, rows, rows_at, inner, out, out_at):
        dot(w, w_at, w_at, act, stride, rows, rows_at, inner, out, out_at)

    return call


def assembly(fmt: str) -> str:
    """The widest micro-kernel's machine code for the processor that numba compiles for."""
    act, rows, out = (
        types.Array(kind, 1, "C") for kind in (types.uint8, types.int32, types.float32)
    )
    i64 = types.int64
    call = inlined(fmt, ROW_BLOCKS[0])
    call.compile((act, i64, act, i64, rows, i64, i64, out, i64))
    return "\n".join(call.inspect_asm().values())
