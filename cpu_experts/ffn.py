"""The validated way in: run these experts, or this matrix, on these tokens.

Everything a call needs besides its arguments lives in one workspace that grows to the largest
call seen and is reused; a lock keeps calls one after the other. In a child that was forked from a
process that had called a kernel, a call raises: start children with ``spawn``.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_experts.checks import check_matrix, check_packed
from cpu_experts.jit.workers import LOCK, used_threads
from cpu_experts.kernels import experts as kernels
from cpu_experts.kernels.dots import dot_table
from cpu_experts.kernels.records import EXPERTS, Experts, fill_record
from hybrid.formats.activations import activation_bytes
from hybrid.formats.block import Block, separate
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, TILE, U8, pad

Ids = NDArray[np.int32] | NDArray[np.int64]


@dataclass
class _Workspace:
    """Named buffers, each as large as the largest call so far asked for.

    ``addresses`` are those of the buffers of :data:`kernels.BUFFERS`, in their order; ``fits``
    are the sizes that they were last made large enough for.
    """

    buffers: dict[str, U8] = field(default_factory=dict)
    addresses: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(kernels.BUFFERS), np.int64)
    )
    fits: tuple[int, ...] = ()

    def get(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        self.reserve(name, size * np.dtype(dtype).itemsize)
        return self.buffers[name].view(dtype)

    def reserve(self, name: str, n_bytes: int) -> None:
        """Make a buffer at least ``n_bytes`` large, whole cache lines."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < n_bytes:
            size = pad(max(n_bytes, 1), 64)
            memory = np.zeros(size + 64, np.uint8)
            start = -memory.ctypes.data % 64
            buffer = self.buffers[name] = memory[start : start + size]
            if name in kernels.BUFFERS:
                self.addresses[kernels.BUFFERS.index(name)] = buffer.ctypes.data

    def scratch(self, threads: int) -> F32:
        """Scratch rows of the threads."""
        width = kernels.SCRATCH_WIDTH
        rows = self.get("scratch", threads * width, np.float32)
        return rows[: threads * width].reshape(threads, width)


_WORKSPACE = _Workspace()


class _Prepared(NamedTuple):
    """A layer's experts, checked and described for a number of threads."""

    blocks: weakref.ref[U8]
    shape: Block
    threads: int
    table: NDArray[Any]
    act_stride: int
    h_stride: int


_PREPARED: dict[int, _Prepared] = {}


def _prepare(blocks: U8, shape: Block, threads: int) -> _Prepared:
    """Describe a layer's experts; remembered for as long as the array lives."""
    key = id(blocks)
    known = _PREPARED.get(key)
    if (
        known is not None
        and known.blocks() is blocks
        and known.shape is shape
        and known.threads == threads
    ):
        return known
    experts = Experts(blocks=blocks, shape=shape)
    table = np.zeros(1, EXPERTS)
    fill_record(table[0], experts.record(threads))
    alive = weakref.ref(blocks, lambda _: _PREPARED.pop(key, None))
    known = _Prepared(
        alive, shape, threads, table, activation_bytes(shape.hidden), experts.h_stride
    )
    _PREPARED[key] = known
    return known


def _activations(x: F32, fmt: str, threads: int) -> tuple[U8, int, int]:
    """Activation rows for ``x`` ``[T, K]``: bytes, bytes a row, steps of the inner loop."""
    tokens, cols = x.shape
    packing = format_of(fmt)
    if not packing.quantized:
        return x.reshape(-1).view(np.uint8), 4 * cols, packing.units(cols)
    stride = activation_bytes(cols)
    act = _WORKSPACE.get("activations", tokens * stride, np.uint8)
    scratch = _WORKSPACE.scratch(threads)
    kernels.quantize_rows(x, dot_table(fmt), scratch, act, stride, threads)
    return act, stride, packing.units(cols)


def _pairs(expert_ids: Ids, num_experts: int) -> tuple[int, Any, Any, Any]:
    """Sort the router's choice by expert: active experts, their ids, their runs, the pairs."""
    flat = np.ascontiguousarray(expert_ids.reshape(-1), dtype=np.int64)
    experts = _WORKSPACE.get("experts", num_experts + 1, np.int64)
    first = _WORKSPACE.get("first", num_experts + 1, np.int64)[: num_experts + 1]
    pairs = _WORKSPACE.get("pairs", max(flat.size, 1), np.int32)
    return kernels.sort_pairs(flat, num_experts, experts, first, pairs), experts, first, pairs


def _check_ids(expert_ids: Ids, tokens: int) -> None:
    if expert_ids.ndim != 2 or expert_ids.shape[0] != tokens or expert_ids.dtype.kind not in "iu":
        raise ShapeError(
            f"expert_ids are {expert_ids.dtype} {list(expert_ids.shape)} for {tokens} tokens;"
            f" they must be integers [{tokens}, choices]"
        )


def _read_only(weights: U8) -> U8:
    """A flat view that kernels cannot write: one compiled signature for mapped and own memory."""
    flat = weights.reshape(-1)
    flat.flags.writeable = False
    return flat


def _reserve(
    work: _Workspace,
    tokens: int,
    pairs: int,
    num_experts: int,
    act_stride: int,
    h_stride: int,
    threads: int,
) -> None:
    """Make every buffer large enough for a call of :func:`kernels.run_routed`."""
    work.reserve("activations", tokens * act_stride)
    work.reserve("experts", 8 * (num_experts + 1))
    work.reserve("first", 8 * (num_experts + 1))
    work.reserve("pairs", 4 * pairs)
    work.reserve("rows", 4 * pairs)
    work.reserve("order", 4 * pairs)
    work.reserve("h", pairs * h_stride)
    work.reserve("counter", 32)
    work.reserve("scratch", 4 * threads * kernels.SCRATCH_WIDTH)
    work.fits = (tokens, pairs, num_experts, act_stride, h_stride, threads)


def run_experts(
    x: F32,
    expert_ids: Ids,
    routing_weights: F32,
    blocks: U8,
    shape: Block,
    out: F32,
) -> None:
    """Add the routed experts' weighted output to ``out``.

    Parameters
    ----------
    x
        Hidden states, ``[T, D]`` float32, C-contiguous.
    expert_ids, routing_weights
        The router's choice, ``[T, A]`` int32 or int64 and float32; an id outside ``[0, E)``
        contributes nothing.
    blocks
        The layer's experts, ``[E, stride]`` uint8, each as
        :func:`~hybrid.formats.block.pack_expert` makes it; what follows a block up to the stride
        is ignored.
    out
        ``[T, D]`` float32, C-contiguous; added to.

    Raises
    ------
    ShapeError
        When shapes, types or layouts disagree; the message gives both.

    Notes
    -----
    Reads each active expert's block once, however many tokens it has. Quantized
    formats see ``x`` and the intermediate activations as int8 in groups of 32, bf16 and f32 as
    float32;
    sums are float32. A result does not depend on the number of threads.
    """
    check_matrix("x", x, (None, shape.hidden))
    check_matrix("out", out, x.shape)
    check_matrix("routing_weights", routing_weights, expert_ids.shape)
    _check_ids(expert_ids, x.shape[0])
    ids = np.ascontiguousarray(expert_ids, np.int64)
    threads = used_threads()
    with LOCK:
        layer = _prepare(blocks, shape, threads)
        work = _WORKSPACE
        sizes = (len(x), ids.size, len(blocks), layer.act_stride, layer.h_stride, threads)
        if work.fits != sizes:
            _reserve(work, *sizes)
        kernels.run_routed(
            layer.table, x, ids, routing_weights, work.addresses, layer.act_stride, out, threads
        )


def _project(
    x: F32,
    expert_ids: Ids,
    flat: U8,
    num_experts: int,
    stride: int,
    fmt: str,
    section: int,
    bias_at: int,
    rows_are_pairs: bool,
    out: F32,
) -> None:
    """Write one matrix's product for every (token, choice) pair to ``out`` ``[pairs, rows]``."""
    with LOCK:
        active, experts, first, pairs = _pairs(expert_ids, num_experts)
        if active == 0:
            return
        threads = used_threads()
        act, act_stride, inner = _activations(x, fmt, threads)
        targets = pairs[: int(first[active])]
        rows = targets if rows_are_pairs else targets // np.int32(expert_ids.shape[1])
        strips = pad(out.shape[1], TILE) // TILE
        kernels.project_pairs(
            dot_table(fmt),
            flat,
            stride,
            section,
            format_of(fmt).strip_bytes(x.shape[1]),
            inner,
            act,
            act_stride,
            bias_at,
            active,
            experts,
            first,
            rows,
            targets,
            max(1, min(4, strips // (8 * threads))),
            _WORKSPACE.get("counter", 4, np.int64),
            _WORKSPACE.scratch(threads),
            threads,
            out,
        )


def project_up(x: F32, expert_ids: Ids, blocks: U8, shape: Block) -> tuple[F32 | None, F32]:
    """Gate and up projections, biases included, of every routed pair: no activation.

    For families whose gating :class:`~hybrid.formats.block.Block` cannot express.

    Parameters
    ----------
    x, expert_ids, blocks
        As in :func:`run_experts`.

    Returns
    -------
    gate float32 ``[T * A, F]`` (None without a gate) and up ``[T * A, F]``; rows of dropped
    ids are zero.

    Raises
    ------
    ShapeError
        When shapes, types or layouts disagree.
    """
    check_matrix("x", x, (None, shape.hidden))
    _check_ids(expert_ids, x.shape[0])
    out = np.zeros((expert_ids.size, shape.up_rows), np.float32)
    _project(
        x,
        expert_ids,
        _read_only(Experts(blocks=blocks, shape=shape).blocks),
        blocks.shape[0],
        blocks.shape[1],
        shape.format,
        0,
        shape.bias_offset if shape.bias else -1,
        False,
        out,
    )
    gate, up = separate(shape, np.ascontiguousarray(out.T))
    return (
        None if gate is None else np.ascontiguousarray(gate.T),
        np.ascontiguousarray(up.T),
    )


def project_down(h: F32, expert_ids: Ids, blocks: U8, shape: Block) -> F32:
    """Down projection, bias included, of every routed pair.

    Parameters
    ----------
    h
        Activated intermediate, ``[T * A, F]`` float32, in the order of ``expert_ids``.

    Returns
    -------
    float32 ``[T * A, D]``, not weighted; rows of dropped ids are zero.

    Raises
    ------
    ShapeError
        When shapes, types or layouts disagree.
    """
    check_matrix("h", h, (expert_ids.size, shape.intermediate))
    out = np.zeros((expert_ids.size, shape.hidden), np.float32)
    _project(
        h,
        expert_ids,
        _read_only(Experts(blocks=blocks, shape=shape).blocks),
        blocks.shape[0],
        blocks.shape[1],
        shape.formats[1],
        shape.down_offset,
        shape.down_bias_offset if shape.bias else -1,
        True,
        out,
    )
    return out


def linear(x: F32, weight: U8, fmt: str, bias: F32 | None, out: F32) -> None:
    """Write ``x @ weight.T + bias`` to ``out``.

    Parameters
    ----------
    x
        ``[T, K]`` float32, C-contiguous.
    weight
        A matrix ``[N, K]`` as :func:`~hybrid.formats.matrix.pack` lays it out.
    bias
        ``[N]`` float32 or None.
    out
        ``[T, N]`` float32, C-contiguous.

    Raises
    ------
    ShapeError
        When shapes, types or layouts disagree.
    """
    check_matrix("x", x, (None, None))
    check_matrix("out", out, (x.shape[0], None))
    if bias is not None:
        check_matrix("bias", bias, (out.shape[1],))
    if x.shape[1] == 0:
        raise ShapeError(f"a matrix of {out.shape[1]} x 0 has no weights")
    size = packed_bytes(out.shape[1], x.shape[1], fmt)
    check_packed(weight, out.shape[1], x.shape[1], fmt, size)
    ids = np.zeros((x.shape[0], 1), np.int64)
    _project(x, ids, _read_only(weight), 1, size, fmt, 0, -1, True, out)
    if bias is not None:
        out += bias
