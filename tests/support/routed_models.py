"""Tiny models of every family, four layers deep, whose experts are a cheap stand-in."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from hybrid.anatomy.experts import ExpertsSpec, find_experts, offer_experts_function
from massive import make_massive
from tiny_families import LAYERS, VOCAB, families, multimodal, tiny_config

DEPTH = 4
#: Every family whose experts run from the store.
KINDS = families() | multimodal("step3p7", "llama4", "qwen3_vl_moe", "qwen3_5_moe", "minimax_m3_vl")
del KINDS["jetmoe"]


def routed_model(
    kind: str, dtype: torch.dtype = torch.float32, massive: bool = False, **changes: Any
) -> tuple[Any, list[ExpertsSpec]]:
    """Return a random model and its experts; what they compute depends on the routing alone."""
    config_kind, model_kind = KINDS[kind]
    shallow = tiny_config(config_kind).to_dict()
    config = tiny_config(config_kind, **_deeper(shallow) | changes)
    seeded = torch.Generator().manual_seed(sum(map(ord, kind)))

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=seeded)

    model = model_kind._from_config(config, experts_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = noise(parameter) * 1.5 / parameter.shape[-1] ** 0.5
        else:
            parameter.data += noise(parameter) * 0.2
    for name, buffer in model.named_buffers():
        if "correction" in name or "expert_bias" in name:
            buffer.copy_(noise(buffer) * 0.25)
        if "tid2eid" in name:
            buffer.random_(0, 8, generator=seeded)
    if massive:
        make_massive(model)
    model.to(dtype)
    specs = find_experts(model)
    offer_experts_function()
    for spec in specs:
        module: Any = spec.module
        module.hybrid_experts = stand_in
        spec.install(model)
    return model, specs


def stand_in(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A result of the experts' shape that no other routing has."""
    scale = torch.tanh((weights * (ids + 1)).sum(-1)).view(*hidden.shape[:-1], 1)
    return (hidden * scale).to(hidden.dtype)


def token_ids(seed: int, batch: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _deeper(settings: dict[str, Any]) -> dict[str, Any]:
    """Repeat what a config says of its two layers until there are ``DEPTH``."""
    deeper: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("num_hidden_layers", "n_layers", "num_layers") and value == LAYERS:
            deeper[name] = DEPTH
        elif isinstance(value, list) and len(value) == LAYERS and re.search("layer|types", name):
            deeper[name] = value * (DEPTH // LAYERS)
        elif name == "text_config":
            deeper[name] = value | _deeper(value)
    return deeper
