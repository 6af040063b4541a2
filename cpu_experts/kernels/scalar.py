"""The micro-kernels of :mod:`cpu_experts.kernels.simd` in plain Python that any processor runs.

Compiled by numba on machines without a vector level of ours, and run uncompiled by the tests
(``NUMBA_DISABLE_JIT=1``). Same arguments, same results up to the order of float additions.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types

from cpu_experts.errors import BackendError
from cpu_experts.jit.addresses import bytes_at, floats_at
from cpu_experts.kernels import scalar_groups
from cpu_experts.kernels.calling import declare
from cpu_experts.kernels.scalar_groups import half
from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.groups import TINY
from hybrid.formats.registry import format_of
from hybrid.formats.strips import GROUP, TILE

ROW_BLOCKS = (4, 2, 1)
READ_WORDS = 64


@njit(nogil=True)
def to_half(x: Any) -> Any:
    """See :func:`cpu_experts.kernels.simd_dense.to_half`."""
    bits = np.float32(x).view(np.uint32)
    sign, size = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if size > 0x7F800000:
        half = np.uint32(0x7E00)
    elif size >= 0x47800000:
        half = np.uint32(0x7C00)
    elif size < 0x38800000:  # a subnormal half counts in what is 0.5's last place
        shifted = np.uint32(size).view(np.float32) + np.float32(0.5)
        half = np.float32(shifted).view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (size >> np.uint32(13)) & np.uint32(1)
        half = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@njit(nogil=True)
def _q4_0(w: Any, w_at: Any, act: Any, act_at: Any, groups: Any, out: Any, out_at: Any) -> None:
    for g in range(groups):
        x = act[act_at + g * ACT_GROUP : act_at + g * ACT_GROUP + GROUP].view(np.int8)
        scale = act[act_at + g * ACT_GROUP + GROUP : act_at + (g + 1) * ACT_GROUP].view(np.float32)
        block = w[w_at + g * 288 : w_at + (g + 1) * 288]
        scales = block[256:].view(np.uint16)
        for row in range(TILE):
            total = np.int32(0)
            for chunk in range(4):
                for byte in range(4):
                    both = block[64 * chunk + 4 * row + byte]
                    k = 4 * chunk + byte
                    total += (np.int32(both & 15) - 8) * np.int32(x[k])
                    total += (np.int32(both >> 4) - 8) * np.int32(x[16 + k])
            out[out_at + row] += np.float32(total) * (half(scales[row]) * scale[0])


@njit(nogil=True)
def _q8_0(w: Any, w_at: Any, act: Any, act_at: Any, groups: Any, out: Any, out_at: Any) -> None:
    for g in range(groups):
        x = act[act_at + g * ACT_GROUP : act_at + g * ACT_GROUP + GROUP].view(np.int8)
        scale = act[act_at + g * ACT_GROUP + GROUP : act_at + (g + 1) * ACT_GROUP].view(np.float32)
        block = w[w_at + g * 544 : w_at + g * 544 + 512].view(np.int8)
        scales = w[w_at + g * 544 + 512 : w_at + (g + 1) * 544].view(np.uint16)
        for row in range(TILE):
            total = np.int32(0)
            for chunk in range(8):
                for byte in range(4):
                    total += np.int32(block[64 * chunk + 4 * row + byte]) * np.int32(
                        x[4 * chunk + byte]
                    )
            out[out_at + row] += np.float32(total) * (half(scales[row]) * scale[0])


@njit(nogil=True)
def _f16(w: Any, w_at: Any, act: Any, act_at: Any, cols: Any, out: Any, out_at: Any) -> None:
    x = act[act_at : act_at + 4 * cols].view(np.float32)
    bits = w[w_at : w_at + 2 * TILE * cols].view(np.uint16)
    for k in range(cols):
        for row in range(TILE):
            out[out_at + row] += half(bits[TILE * k + row]) * x[k]


@njit(nogil=True)
def _bf16(w: Any, w_at: Any, act: Any, act_at: Any, cols: Any, out: Any, out_at: Any) -> None:
    x = act[act_at : act_at + 4 * cols].view(np.float32)
    bits = w[w_at : w_at + 2 * TILE * cols].view(np.uint16)
    for k in range(cols):
        for row in range(TILE):
            value = np.uint32(np.uint32(bits[TILE * k + row]) << np.uint32(16)).view(np.float32)
            out[out_at + row] += value * x[k]


@njit(nogil=True)
def _f32(w: Any, w_at: Any, act: Any, act_at: Any, cols: Any, out: Any, out_at: Any) -> None:
    x = act[act_at : act_at + 4 * cols].view(np.float32)
    values = w[w_at : w_at + 4 * TILE * cols].view(np.float32)
    for k in range(cols):
        for row in range(TILE):
            out[out_at + row] += values[TILE * k + row] * x[k]


#: A strip times one activation row, of every weight format and of ``f16``.
LOOPS: dict[str, Callable[..., None]] = {
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "f16": _f16,
    "bf16": _bf16,
    "f32": _f32,
} | scalar_groups.LOOPS


def sums_of(fmt: str) -> int:
    """See :func:`cpu_experts.kernels.simd_loops.sums_of`; these kernels need no sums.

    Raises
    ------
    BackendError
        When there is no loop of this format.
    """
    if fmt not in LOOPS:
        raise BackendError(f"the scalar kernels do not know the weight format {fmt!r}")
    return 0


def strip_dot(fmt: str, n: int) -> Any:
    """See :func:`cpu_experts.kernels.simd.strip_dot`."""
    one = LOOPS[fmt]

    def dot(w, w_at, then_at, act, stride, rows, rows_at, inner, out, out_at):
        for t in range(n):
            at = out_at + TILE * t
            out[at : at + TILE] = 0
            one(w, w_at, act, rows[rows_at + t] * stride, inner, out, at)

    dot.__qualname__ = f"strip_dot_{fmt}_{n}"  # see scalar_groups.of_its_own
    return njit(nogil=True)(dot)


def micro_kernel(context: Any, b: Any, fmt: str, n: int) -> Any:
    """See :func:`cpu_experts.kernels.simd.micro_kernel`: the loop behind plain addresses."""
    name = f"strip_dot_{fmt}_{n}"
    if name in b.module.globals:
        return b.module.globals[name]
    known, one, pointer = format_of(fmt), LOOPS[fmt], types.int64
    unit = np.int64(known.unit_bytes)
    x_bytes = np.int64(known.unit_inputs // GROUP * ACT_GROUP if known.quantized else 4)

    def dot(w, act, stride, rows, inner, out):
        strip, index = bytes_at(w, inner * unit), bytes_at(rows, 4 * n).view(np.int32)
        sums = floats_at(out, TILE * n)
        sums[:] = 0
        for t in range(n):
            x = bytes_at(act + index[t] * stride, inner * x_bytes)
            one(strip, 0, x, 0, inner, sums, TILE * t)

    dot.__qualname__ = f"micro_kernel_{fmt}_{n}"
    function = declare(b.module, name)
    own = ir.IRBuilder(function.append_basic_block())
    w, _, act, stride, rows, inner, out = function.args
    w, act, rows, out = (own.ptrtoint(at, ir.IntType(64)) for at in (w, act, rows, out))
    signature = types.void(*[pointer] * 6)
    compiled = context.compile_subroutine(own, dot, signature)
    args = [w, act, stride, rows, inner, out]
    context.call_internal_no_propagate(own, compiled.fndesc, signature, args)
    own.ret_void()
    return function


@njit(nogil=True)
def silu_strip(gate: Any, at: Any, alpha: Any, out: Any, out_at: Any) -> None:
    """See :func:`cpu_experts.kernels.simd_dense.silu_strip`."""
    for i in range(TILE):
        g = gate[at + i]
        out[out_at + i] = g / (np.float32(1) + np.exp(-alpha * g))


@njit(nogil=True)
def add_strip(x: Any, at: Any, scale: Any, out: Any, out_at: Any) -> None:
    """See :func:`cpu_experts.kernels.simd_dense.add_strip`."""
    for i in range(TILE):
        out[out_at + i] += scale * x[at + i]


@njit(nogil=True)
def multiply_strip(x: Any, at: Any, y: Any, y_at: Any, offset: Any) -> None:
    """See :func:`cpu_experts.kernels.simd_dense.multiply_strip`."""
    for i in range(TILE):
        x[at + i] *= y[y_at + i] + offset


@njit(nogil=True)
def copy_strip(x: Any, at: Any, out: Any, out_at: Any) -> None:
    """See :func:`cpu_experts.kernels.simd_dense.copy_strip`."""
    for i in range(TILE):
        out[out_at + i] = x[at + i]


@njit(nogil=True)
def quantize_group(x: Any, at: Any, sums: Any, act: Any, act_at: Any) -> None:
    """See :func:`cpu_experts.kernels.simd.quantize_group`; these kernels need no sums."""
    top = np.float32(0)
    for i in range(GROUP):
        size = abs(x[at + i])
        if not size <= top:  # true for NaN too
            top = size
            if size != size:
                break
    codes = act[act_at : act_at + GROUP].view(np.int8)
    tail = act[act_at + GROUP : act_at + ACT_GROUP].view(np.float32)
    tail[:] = 0
    tail[0] = top / np.float32(127)
    finite = top > TINY and top < np.inf
    inverse = np.float32(127) / top if finite else np.float32(0)
    for i in range(GROUP):
        codes[i] = np.int8(np.rint(x[at + i] * inverse)) if finite else np.int8(0)


@njit(nogil=True)
def largest_of(x: Any, at: Any, count: Any) -> Any:
    """See :func:`cpu_experts.kernels.simd_dense.largest_of`."""
    most = x[at]
    for i in range(at, at + count):
        most = max(most, x[i])
    return most


@njit(nogil=True)
def exp_all(x: Any, at: Any, count: Any, shift: Any) -> Any:
    """See :func:`cpu_experts.kernels.simd_dense.exp_all`."""
    total = np.float32(0)
    for i in range(at, at + count):
        x[i] = np.exp(x[i] - shift)
        total += x[i]
    return total


@njit(nogil=True)
def sum_words(words: Any, at: Any, count: Any) -> Any:
    """See :func:`cpu_experts.kernels.simd_dense.sum_words`."""
    total = np.uint64(0)
    for word in words[at : at + count]:
        total += word
    return total


if config.DISABLE_JIT:

    def fetch_add(counter: Any, at: Any) -> Any:
        """See :func:`cpu_experts.jit.atomics.fetch_add`."""
        counter[at] += 1
        return counter[at] - 1

    def wait_for(counter: Any, at: Any, value: Any) -> None:
        """See :func:`cpu_experts.jit.atomics.wait_for`; one thread has nobody to wait for."""
        assert counter[at] >= value

    def ticks() -> Any:
        """See :func:`cpu_experts.jit.atomics.ticks`."""
        return time.perf_counter_ns()

else:
    from cpu_experts.jit.atomics import fetch_add as fetch_add
    from cpu_experts.jit.atomics import ticks as ticks
    from cpu_experts.jit.atomics import wait_for as wait_for
