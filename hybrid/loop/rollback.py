"""Takes tokens back out of a cache, where a draft was not what came."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


def not_cut(cache: Any) -> str | None:
    """Return why tokens of a cache cannot be taken back again; None where they can."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            return f"layer {index} keeps a state, from which no token can be taken back"
        if layer.is_sliding:
            return f"layer {index} keeps a window, from which no token can be taken back"
        if not isinstance(layer, DynamicLayer):
            return f"layer {index} has a cache of {type(layer).__name__}"
    return None


def take_back(cache: Any, count: int) -> None:
    """Forget the last ``count`` tokens."""
    if count:
        for layer in cache.layers:
            layer.crop(-count)
