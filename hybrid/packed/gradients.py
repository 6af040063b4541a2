"""Packed weights without kernels: torch's arithmetic on the numbers they hold, for gradients.

The kernels know no derivatives, and where weights are quantized they round activations to int8,
which has none. So what trains is computed in float32 on the dequantized weights, forwards and
backwards: the loss belongs to the very function whose derivative is taken, and transformers' own
code has the same of both with the same weights. The weights stay as they are.

A few rows of a matrix are dequantized at a time, forwards and again backwards, and forgotten at
once. Activations are kept for the way back as transformers keeps them, unless gradient
checkpointing has them computed again. A forked child, where no kernel runs, computes so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpu_experts.jit.workers import kernels_run
from cpu_experts.kernels.widen import WIDENED, widen
from gpu_experts.reference import dequantize
from hybrid.errors import UsageError
from hybrid.formats.block import Block
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of
from hybrid.formats.strips import GROUP, TILE, U8, pad

_WEIGHTS = 1 << 22
"""The most weights that are dequantized at a time."""

#: What an expert does between its projections: from the packed up side's product ``[n, up_rows]``
#: to what down multiplies, ``[n, F]``.
Gate = Callable[[Tensor], Tensor]


def in_torch(training: bool, *tensors: Tensor | None) -> bool:
    """Whether a call is computed here: it wants gradients, or its module is in training.

    Reentrant gradient checkpointing has a module in training compute once without gradients, and
    again with them: it must come to the same. And in a forked child there are no kernels.
    """
    if not kernels_run():
        return True
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return training or (torch.is_grad_enabled() and wanted)


def product(x: Tensor, packed: U8, rows: int, fmt: str) -> Tensor:
    """Return ``x @ weight.T`` ``[n, rows]`` of float32 ``x`` with a packed matrix."""
    result: Tensor = _Product.apply(x, packed, rows, fmt)  # type: ignore[no-untyped-call]
    return result


def run_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    blocks: U8,
    shape: Block,
    expert: Callable[[U8, Tensor], Tensor],
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, with its derivatives.

    Parameters
    ----------
    hidden, expert_ids, routing_weights, blocks, shape
        As for :class:`hybrid.packed.experts.LayerExperts`.
    expert
        Returns one expert's output ``[n, D]`` float32 on tokens ``[n, D]`` float32, given its
        block (:func:`run_expert`).
    """
    with torch.autocast("cpu", enabled=False):
        x = hidden.reshape(-1, shape.hidden).float().cpu()
        ids, choices = expert_ids.cpu().reshape(-1), expert_ids.shape[1]
        inside = torch.nonzero((ids >= 0) & (ids < len(blocks))).flatten()
        pairs = inside[ids[inside].argsort(stable=True)]
        loads = ids[pairs].bincount(minlength=len(blocks)).tolist()
        tokens = pairs // choices
        each = x[tokens].split(loads)  # type: ignore[no-untyped-call]
        rows = [expert(blocks[e], each[e]) for e, load in enumerate(loads) if load]
        weights = routing_weights.float().cpu().reshape(-1)[pairs, None]
        out = torch.zeros_like(x).index_add(0, tokens, torch.cat(rows) * weights if rows else x[:0])
    return out.view(hidden.shape).to(hidden.device, hidden.dtype)


def run_expert(block: U8, x: Tensor, shape: Block, gate: Gate) -> Tensor:
    """Return one expert's output ``[n, D]`` float32 on tokens ``[n, D]`` float32, not weighted."""
    d = shape.hidden
    down = block[shape.down_offset : shape.down_offset + shape.down_bytes]
    out = product(gate(up_side(block, x, shape)), down, d, shape.formats[1])
    return out + _biases(block, shape)[shape.up_rows :][:d] if shape.bias else out


def up_side(block: U8, x: Tensor, shape: Block) -> Tensor:
    """Return the product of one expert's packed up side ``[n, up_rows]``, its biases added."""
    up = product(x, block[: shape.up_bytes], shape.up_rows, shape.format)
    return up + _biases(block, shape)[: shape.up_rows] if shape.bias else up


def _biases(block: U8, shape: Block) -> Tensor:
    """All biases of an expert, those of the packed up side first."""
    floats = block[shape.bias_offset : shape.block_bytes].view(np.float32)
    return torch.from_numpy(floats.copy())


def tokens_of(
    hidden: Tensor, expert_ids: Tensor, shape: Block, experts: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield every expert that was chosen, and its tokens ``[n, D]`` in float32."""
    x = hidden.detach().reshape(-1, shape.hidden).float().cpu()
    ids = expert_ids.detach().cpu()
    for expert in sorted(set(ids.reshape(-1).tolist())):
        if 0 <= expert < experts:
            yield expert, x[(ids == expert).any(dim=1)]


class _Product(torch.autograd.Function):
    """Multiplies with a packed matrix; backwards, too, a few of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: U8, rows: int, fmt: str) -> Tensor:
        ctx.matrix = packed, rows, x.shape[1], fmt
        y = x.new_empty(len(x), rows)
        for some, weights in _rows_of(*ctx.matrix):
            y[:, some] = functional.linear(x, weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, _, cols, _ = ctx.matrix
        found = grad.new_zeros(len(grad), cols)
        for some, weights in _rows_of(*ctx.matrix):
            found.addmm_(grad[:, some], weights)
        return found, None, None, None


def _rows_of(packed: U8, rows: int, cols: int, fmt: str) -> Iterator[tuple[slice, Tensor]]:
    """Dequantize some rows of a matrix after the other, as float32 ``[n, cols]``."""
    step = TILE * max(1, _WEIGHTS // (TILE * pad(cols, GROUP)))
    strip = format_of(fmt).strip_bytes(cols)
    for first in range(0, rows, step):
        here = min(step, rows - first)
        piece = packed[first // TILE * strip :][: packed_bytes(here, cols, fmt)]
        piece.flags.writeable = False  # whoever owns it: one compiled signature
        if fmt in WIDENED and kernels_run():
            values = np.empty((pad(here, TILE), pad(cols, GROUP)), np.float32)
            widen(piece, here, cols, fmt, values)
            found = torch.from_numpy(values)[:here, :cols]
        else:  # of a copy: torch takes no memory that cannot be written
            found = dequantize(torch.from_numpy(piece.copy()), here, cols, fmt)
        yield slice(first, first + here), found


class _Refused(torch.autograd.Function):
    """Passes on a value that was computed without regard to gradients, and none back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, why: str, hint: str, *_: Tensor) -> Tensor:
        ctx.said = why, hint
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        why, hint = ctx.said
        raise UsageError(why, hint=hint)


def refuse_gradients(value: Tensor, *inputs: Tensor, why: str, hint: str) -> Tensor:
    """Return ``value``, whose derivatives with respect to ``inputs`` raise a UsageError."""
    result: Tensor = _Refused.apply(value, why, hint, *inputs)  # type: ignore[no-untyped-call]
    return result
