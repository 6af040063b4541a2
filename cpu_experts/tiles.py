"""The validated way to the matrix units (AMX): experts and matrices of many tokens.

Weights and activations are rounded to bfloat16, to 8 bits of mantissa, and sums are float32. From
some number of tokens on that is faster than the kernels of :mod:`cpu_experts.ffn`, which multiply
packed weights as they are; which number, callers measure.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cpu_experts.checks import check_matrix, check_packed
from cpu_experts.errors import BackendError
from cpu_experts.jit import hostcpu
from cpu_experts.jit.simd_level import EMULATED, LEVEL, SCALAR
from cpu_experts.jit.workers import LOCK, used_threads
from cpu_experts.workspace import WORKSPACE, Ids, check_ids, read_only, sorted_pairs
from hybrid.formats.block import ACTIVATIONS, Block
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of, is_quantized
from hybrid.formats.strips import F32, GROUP, U8, pad

#: Of Linux: the call that asks for the units, what is asked, and which part of the state they are.
_ARCH_PRCTL, _ASK, _TILE_DATA = 158, 0x1023, 18
_NEEDED = frozenset({"amx-tile", "amx-bf16", "avx512bf16", "avx512vbmi"})


def available() -> bool:
    """Whether this process may use the units, and is not told to do without (``HYBRID_SIMD``)."""
    if SCALAR or EMULATED or LEVEL != "avx512vnni" or "amx" not in hostcpu.processor().units:
        return False
    return hostcpu.host_features() >= _NEEDED and _granted()


@cache
def _granted() -> bool:
    """Ask the system for the units' registers, which only Linux knows to be asked."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK, _TILE_DATA) == 0)


def takes(fmt: str, cols: int) -> bool:
    """Whether matrices of a format with so many inputs can be multiplied here."""
    return available() and (is_quantized(fmt) or (fmt == "bf16" and cols % GROUP == 0))


def takes_experts(shape: Block) -> bool:
    """Whether both sides of experts can be."""
    up, down = shape.formats
    return takes(up, shape.hidden) and takes(down, shape.intermediate)


def _kernels(fmt: str, cols: int) -> ModuleType:
    if not takes(fmt, cols):
        raise BackendError(
            f"a matrix of {fmt} with {cols} inputs is not multiplied by matrix units here",
            hint="they take quantized formats, bf16 with a multiple of 32 inputs, and a processor "
            "with AMX",
        )
    from cpu_experts.kernels import tile_items  # compiles what only processors with AMX run

    return tile_items


class _Side(NamedTuple):
    """A matrix as the kernels take it: what widens it, its strips, and an item's share.

    Attributes
    ----------
    filler
        An address.
    strip
        Bytes of a strip.
    steps
        Its tiles.
    strips
        That an item takes.
    tiles
        Bytes of their tiles.
    stride
        Bytes from one row of activations to the next: a line more than it has, else rows share a
        set of the nearest cache.
    """

    filler: int
    strip: int
    steps: int
    strips: int
    tiles: int
    stride: int


def _side(fmt: str, cols: int, least: int) -> _Side:
    """Describe a matrix with ``cols`` inputs, of which an item takes a multiple of ``least``."""
    kernels, known = _kernels(fmt, cols), format_of(fmt)
    from cpu_experts.kernels.tiles import filler

    steps = pad(cols, max(GROUP, known.unit_inputs)) // GROUP
    each = steps * kernels.TILE_BYTES
    strips = max(least, min(kernels.STRIPS, kernels.TILES // each) // least * least)
    tiles = max(strips * each, 2 * kernels.STEPS * kernels.TILE_BYTES)
    return _Side(filler(fmt), known.strip_bytes(cols), steps, strips, tiles, 2 * GROUP * steps + 64)


def run_experts(
    x: F32, expert_ids: Ids, routing_weights: F32, blocks: U8, shape: Block, out: F32
) -> None:
    """Add the routed experts' weighted output to ``out``.

    Parameters, errors
        As for :func:`cpu_experts.ffn.run_experts`.
    """
    d, f = shape.hidden, shape.intermediate
    kernels = _kernels(shape.formats[1], f)
    least = 4 if shape.gated else 2
    up, down = _side(shape.formats[0], d, least), _side(shape.formats[1], f, 2)
    check_matrix("x", x, (None, d))
    check_matrix("out", out, x.shape)
    check_matrix("routing_weights", routing_weights, expert_ids.shape)
    check_ids(expert_ids, len(x))
    good = blocks.ndim == 2 and blocks.dtype == np.uint8 and blocks.flags.c_contiguous
    if not good or blocks.shape[1] < shape.block_bytes:
        raise ShapeError(
            f"blocks are {blocks.dtype} {list(blocks.shape)}; they must be C-contiguous uint8"
            f" [experts, at least {shape.block_bytes}]"
        )
    threads = used_threads()
    with LOCK:
        active, experts, first, pairs = sorted_pairs(expert_ids, len(blocks))
        if active == 0:
            return
        # A product may read a tile of tokens beyond the last; what it makes of them is not used.
        rows = int(first[active]) + kernels.TOKENS
        h = WORKSPACE.rows("tile intermediates", rows, down.stride, np.uint8)
        h[:, 2 * pad(f, GROUP) :] = 0  # what a format has of inputs beyond the last group
        kernels.run_tiles(
            up.filler,
            read_only(blocks),
            blocks.shape[1],
            up.strip,
            up.steps,
            up.strips // least,
            shape.down_offset,
            down.filler,
            down.strip,
            down.steps,
            down.strips,
            ACTIVATIONS.index(shape.activation),
            np.float32(shape.alpha),
            np.float32(shape.limit),
            np.float32(shape.up_offset),
            shape.gated,
            shape.bias_offset if shape.bias else -1,
            shape.down_bias_offset if shape.bias else -1,
            f,
            active,
            experts,
            first,
            pairs,
            expert_ids.shape[1],
            routing_weights.reshape(-1),
            x,
            WORKSPACE.get("tile activations", rows * up.stride, np.uint8),
            up.stride,
            h.reshape(-1),
            down.stride,
            WORKSPACE.get("tile counters", kernels.COUNTERS, np.int64),
            WORKSPACE.rows("tiles", threads, max(up.tiles, down.tiles), np.uint8),
            WORKSPACE.rows("tile sums", threads, kernels.SUMS, np.float32),
            threads,
            out,
        )


def linear(x: F32, weight: U8, fmt: str, bias: F32 | None, out: F32) -> None:
    """Write ``x @ weight.T + bias`` to ``out``.

    Parameters, errors
        As for :func:`cpu_experts.ffn.linear`.
    """
    kernels = _kernels(fmt, x.shape[1])
    check_matrix("x", x, (None, None))
    check_matrix("out", out, (x.shape[0], None))
    if bias is not None:
        check_matrix("bias", bias, (out.shape[1],))
    check_packed(weight, out.shape[1], x.shape[1], fmt, packed_bytes(out.shape[1], x.shape[1], fmt))
    threads, side = used_threads(), _side(fmt, x.shape[1], 2)
    with LOCK:
        kernels.multiply_tiles(
            side.filler,
            read_only(weight),
            side.strip,
            side.steps,
            side.strips,
            x,
            np.arange(len(x), dtype=np.int32),
            WORKSPACE.get("tile activations", (len(x) + kernels.TOKENS) * side.stride, np.uint8),
            side.stride,
            np.zeros(1, np.float32) if bias is None else bias,
            bias is not None,
            WORKSPACE.get("tile counters", kernels.COUNTERS, np.int64),
            WORKSPACE.rows("tiles", threads, side.tiles, np.uint8),
            WORKSPACE.rows("tile sums", threads, kernels.SUMS, np.float32),
            threads,
            out,
        )
