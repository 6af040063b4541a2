"""Micro-kernels by address: a format's are compiled when it is first used, and only then.

What a format needs is a table of numbers (:func:`dot_table`), which records of weights point at: a
product calls the micro-kernel that the table names, so the loops around it are compiled once for
all formats, and a start that uses two of sixteen formats compiles two.
"""

# numba infers the types of compiled functions, and calls the intrinsics with its own.
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cpu_experts.jit.addresses import words_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.jit.ir import I64
from cpu_experts.kernels.calling import MICRO_KERNEL, operands
from cpu_experts.kernels.micro import ROW_BLOCKS, micro_kernel, strip_dot, sums_of
from hybrid.formats.registry import FORMATS, format_of

#: Places in a table: the micro-kernels' addresses by :data:`ROW_BLOCKS`, then whether activations
#: are quantized, then what sums of theirs the format takes.
QUANTIZED, SUMS, SIZE = (np.int64(len(ROW_BLOCKS) + at) for at in range(3))

_TABLES: dict[str, NDArray[np.int64]] = {}
#: What holds the machine code of micro-kernels, which stays where it is while this does.
MADE: list[Any] = []
_LOCK = threading.Lock()


def dot_table(fmt: str) -> int:
    """Return the address of a format's table, which stays; compiles its micro-kernels at first.

    Raises
    ------
    FormatError
        On an unknown format.
    BackendError
        When these kernels do not have it.
    """
    with _LOCK:
        if fmt not in _TABLES:
            table = np.zeros(SIZE, np.int64)
            table[QUANTIZED] = format_of(fmt).quantized
            table[SUMS] = sums_of(fmt)
            _fill(table, fmt)
            _TABLES[fmt] = table
        return int(_TABLES[fmt].ctypes.data)


@kernel()
def is_quantized(fmt):
    """Whether the format of this table has groups, and so takes int8 activations."""
    return words_at(fmt, SIZE)[QUANTIZED] != 0


@kernel()
def sums_for(fmt):
    """What sums an activation group carries for the format of this table."""
    return np.int32(words_at(fmt, SIZE)[SUMS])


if config.DISABLE_JIT:
    _CALLED: list[Any] = []

    def _fill(table: Any, fmt: str) -> None:
        """Put a format's micro-kernels into a table: their places in a list."""
        for at, n in enumerate(ROW_BLOCKS):
            table[at] = len(_CALLED)
            _CALLED.append(strip_dot(fmt, n))

    def dot(
        found: Any, w: Any, w_at: Any, then_at: Any, act: Any, stride: Any, rows: Any,
        rows_at: Any, inner: Any, out: Any, out_at: Any,
    ) -> None:  # fmt: skip
        """Call the micro-kernel that a table has at one of its places."""
        _CALLED[found](w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at)

else:

    @intrinsic(prefer_literal=True)
    def _address(typingctx, number, n):
        """The address of the micro-kernel of the format in this place of the registry."""
        if not isinstance(number, types.IntegerLiteral) or not isinstance(n, types.IntegerLiteral):
            return None

        def codegen(context, b, signature, args):
            name = list(FORMATS)[number.literal_value]
            return b.ptrtoint(micro_kernel(context, b, name, n.literal_value), I64)

        return types.int64(number, n), codegen

    def _fill(table: Any, fmt: str) -> None:
        """Put the addresses of a format's micro-kernels into a table; a file of the cache each."""
        number = list(FORMATS).index(fmt)
        wide, middle, one = ROW_BLOCKS

        def find(table):
            table[0] = _address(number, wide)
            table[1] = _address(number, middle)
            table[2] = _address(number, one)

        find.__qualname__ = f"micro_kernels_{fmt}"
        found = kernel()(find)
        found(table)
        MADE.append(found)

    @intrinsic
    def dot(
        typingctx, found, w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at
    ):  # fmt: skip
        """Call the micro-kernel at an address, see :func:`cpu_experts.kernels.simd.strip_dot`."""

        def codegen(context, b, signature, args):
            function = b.inttoptr(args[0], MICRO_KERNEL.as_pointer())
            b.call(function, operands(context, b, signature.args[1:], args[1:]))
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(i64, w, i64, i64, act, i64, rows, i64, i64, out, i64), codegen
