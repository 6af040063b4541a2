"""What reading a model's parts needs: samples, comparisons, packed copies, and what to raise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpu_experts.decoder.layers import Matrix
from cpu_experts.formats import F32
from hybrid.packed.dense import Arena, pack_linear


class UnfitError(Exception):
    """Why a model's decoder is none that the one-token kernels know.

    ``hint`` is what would help, None when nothing does.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class WrongError(UnfitError):
    """How far the kernels are from what transformers computes."""


def floats(tensor: Tensor | None) -> F32 | None:
    """Return a flat copy in float32, None of None."""
    if tensor is None:
        return None
    return tensor.detach().float().reshape(-1).contiguous().numpy().copy()


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results in float32 differ by rounding at most.

    Numbers count beside the largest of their column, whatever its size: weights of trained
    models are not of size one, and those of one norm may be a thousand times apart.
    """
    sizes = wanted.abs().amax(dim=0)
    return bool(((found - wanted).abs() <= 1e-4 * sizes).all())


def sample(*shape: int) -> Tensor:
    """Return the same normal numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def packed_rows(weight: Tensor, bias: Tensor | None, arena: Arena) -> Matrix:
    """Return a copy of a matrix ``[rows, cols]`` for the kernels, not rounded."""
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module = pack_linear(linear)
    arena.move(module.packed)
    return Matrix(
        weight=module.packed.numpy(),
        rows=rows,
        cols=cols,
        format=module.weight_format,
        bias=floats(bias),
    )
