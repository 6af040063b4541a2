"""What reading a model's parts needs: samples, comparisons, and what to raise."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid.formats.strips import F32


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


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results in float32 differ by rounding at most.

    Numbers count beside the largest of their column, whatever its size: weights of trained
    models are not of size one, and those of one norm may be a thousand times apart.
    """
    sizes = expected.abs().amax(dim=0)
    return bool(((found - expected).abs() <= 1e-4 * sizes).all())


def sample(*shape: int) -> Tensor:
    """Return the same normal numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
