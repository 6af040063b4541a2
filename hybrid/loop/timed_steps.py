"""Times steps of a few tokens before anything is generated."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from hybrid.loop.rollback import not_cut, take_back
from hybrid.transformers_api import cache_argument

_TOKENS = (1, 2, 16)


def step_seconds(network: Any) -> dict[int, float]:
    """Return how long steps of so many tokens take, all of them the same token.

    So they use few different experts, and no memory that a step of one token does not use. Empty
    for a network whose cache cannot be cut back.
    """
    if not network._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=network.config.get_text_config(decoder=True))
    ids = torch.zeros(1, max(_TOKENS), dtype=torch.long)
    inputs = {"use_cache": True, **cache_argument(cache)}
    found: dict[int, float] = {}
    with torch.no_grad():
        network(input_ids=ids[:, :2], **inputs)
        if not_cut(cache) is not None:
            return {}
        for tokens in _TOKENS:
            begun_s = time.perf_counter()
            network(input_ids=ids[:, :tokens], **inputs)
            found[tokens] = time.perf_counter() - begun_s
            take_back(cache, tokens)
    return found
