"""The micro-kernels of :mod:`cpu_experts.simd` in plain Python that any processor runs.

Compiled by numba on machines without a vector level of ours, and run uncompiled by the tests
(``NUMBA_DISABLE_JIT=1``). Same arguments, same results up to the order of float additions.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit

from cpu_experts.formats import ACT_GROUP, GROUP, TILE, TINY

ROW_BLOCKS = (4, 2, 1)


@njit(nogil=True)
def _half(bits: Any) -> Any:
    """The value of an fp16 given as 16 bits."""
    fraction, exponent = int(bits & 1023), int((bits >> 10) & 31)
    if exponent == 0:
        size = math.ldexp(float(fraction), -24)
    else:
        size = math.ldexp(float(fraction + 1024), exponent - 25)
    return np.float32(-size if bits >> 15 else size)


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
            out[out_at + row] += np.float32(total) * (_half(scales[row]) * scale[0])


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
            out[out_at + row] += np.float32(total) * (_half(scales[row]) * scale[0])


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


_ONE_ROW: dict[str, Callable[..., None]] = {
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "bf16": _bf16,
    "f32": _f32,
}


def strip_dot(fmt: str, n: int) -> Any:
    """See :func:`cpu_experts.simd.strip_dot`."""
    one = _ONE_ROW[fmt]

    @njit(nogil=True)
    def dot(w, w_at, act, stride, rows, rows_at, inner, out, out_at):
        for t in range(n):
            at = out_at + TILE * t
            out[at : at + TILE] = 0
            one(w, w_at, act, rows[rows_at + t] * stride, inner, out, at)

    return dot


@njit(nogil=True)
def silu_strip(gate: Any, at: Any, alpha: Any, out: Any, out_at: Any) -> None:
    """See :func:`cpu_experts.simd.silu_strip`."""
    for i in range(TILE):
        g = gate[at + i]
        out[out_at + i] = g / (np.float32(1) + np.exp(-alpha * g))


@njit(nogil=True)
def quantize_group(x: Any, at: Any, offset: Any, act: Any, act_at: Any) -> None:
    """See :func:`cpu_experts.simd.quantize_group`; these kernels need no start value."""
    top = np.float32(0)
    for i in range(GROUP):
        size = abs(x[at + i])
        if not size <= top:  # true for NaN too
            top = size
            if size != size:
                break
    codes = act[act_at : act_at + GROUP].view(np.int8)
    tail = act[act_at + GROUP : act_at + ACT_GROUP].view(np.float32)
    tail[0], tail[1] = top / np.float32(127), 0
    finite = top > TINY and top < np.inf
    inverse = np.float32(127) / top if finite else np.float32(0)
    for i in range(GROUP):
        codes[i] = np.int8(np.rint(x[at + i] * inverse)) if finite else np.int8(0)


@njit(nogil=True)
def exp_strip(x: Any, at: Any, shift: Any) -> None:
    """See :func:`cpu_experts.simd_dense.exp_strip`."""
    for i in range(TILE):
        x[at + i] = np.exp(x[at + i] - shift)


if config.DISABLE_JIT:

    def fetch_add(counter: Any, at: Any) -> Any:
        """See :func:`cpu_experts.simd.fetch_add`."""
        counter[at] += 1
        return counter[at] - 1

    def wait_for(counter: Any, at: Any, value: Any) -> None:
        """See :func:`cpu_experts.simd.wait_for`; one thread has nobody to wait for."""
        assert counter[at] >= value

else:
    from cpu_experts.simd import fetch_add as fetch_add
    from cpu_experts.simd import wait_for as wait_for
