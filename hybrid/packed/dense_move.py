"""Moves everything but the experts to a device, quantized matrices widened."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrid.grafts import put_module
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
            put_module(model.get_submodule(owner), leaf, module.ordinary(widened[key]))
    model.to(where)
