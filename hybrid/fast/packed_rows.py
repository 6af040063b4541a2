"""Copies of small matrices for the kernels."""

from __future__ import annotations

from torch import Tensor, nn

from cpu_experts.decoder.matrices import Matrix
from hybrid.anatomy.samples import floats
from hybrid.packed.dense import Arena, pack_linear


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
