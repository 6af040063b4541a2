"""Times steps of a few tokens before anything is generated."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from hybrid.loop.rollback import not_cut, take_back
from hybrid.transformers_api import cache_argument

_TOKENS = (1, 2, 16)
#: Steps that take longer than this together are timed once: what disturbs them counts less.
_LONG_S = 0.1


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
        for tokens in _TOKENS * 2:
            if tokens in found and sum(found.values()) > _LONG_S:
                break
            begun_s = time.perf_counter()
            network(input_ids=ids[:, :tokens], **inputs)
            step_s = time.perf_counter() - begun_s
            found[tokens] = min(step_s, found.get(tokens, step_s))
            take_back(cache, tokens)
    return found
