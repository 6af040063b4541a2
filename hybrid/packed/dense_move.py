"""Moves everything but the experts to a device, quantized matrices widened."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrid.packed.dense import QuantizedEmbedding, QuantizedLinear


def move_dense(model: Any, where: torch.device) -> None:
    """Move everything but the experts to a device; quantized matrices in the model's dtype."""
    if where.type == "cpu":
        return
    widened: dict[int, nn.Parameter] = {}  # tied matrices stay one
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            owner, _, leaf = name.rpartition(".")
            key = id(module.packed)
            if key not in widened:
                widened[key] = nn.Parameter(module.weight.to(where, model.dtype), False)
            setattr(model.get_submodule(owner), leaf, _plain(module, widened[key]))
    model.to(where)


def _plain(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """Return an ordinary layer with a quantized one's weights, widened."""
    new: nn.Linear | nn.Embedding
    with torch.device("meta"):
        if isinstance(module, QuantizedEmbedding):
            new = nn.Embedding(module.rows, module.cols)
        else:
            new = nn.Linear(module.cols, module.rows, bias=module.bias is not None)
    new.weight = weight
    if isinstance(module, QuantizedLinear) and module.bias is not None:
        new.bias = module.bias
    return new
