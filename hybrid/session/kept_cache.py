"""Keeps the cache of a conversation's last turn, from which the next one goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


class KeptCache:
    """Keys and values of one sequence, kept between calls.

    Where the next prompt goes another way, what follows the common beginning is cut off, if the
    layers can be cut: those with a window cannot, and then all is computed anew. A model with a
    state instead of keys in some layers is always computed anew.

    Attributes
    ----------
    reused
        Tokens of the last prompt that were in it already.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []
        self.reused = 0

    def begin(self, network: Any, ids: Tensor) -> Any:
        """Return the cache to compute a prompt ``[1, T]`` with; None: transformers makes its own.

        It is this object's alone until :meth:`end`, so that a call that is broken off leaves none.
        """
        cache, known, prompt = self._cache, self._ids, ids[0].tolist()
        self.forget()
        alike = _common(
            known, prompt[:-1]
        )  # one token has to be computed: its logits are asked for
        if cache is not None and alike and (alike == len(known) or _cut(cache, len(known), alike)):
            self.reused = alike
            return cache
        if not network._supports_default_dynamic_cache():
            return None
        fresh = DynamicCache(config=network.config.get_text_config(decoder=True))
        return fresh if all(map(_holds_keys, fresh.layers)) else None

    def end(self, cache: Any, ids: list[int]) -> None:
        """Keep a ``cache`` of a sequence that begins with it; ``ids`` are all tokens of that."""
        layers = getattr(cache, "layers", ())
        if not all(map(_holds_keys, layers)):
            return
        lengths = {layer.get_seq_length() for layer in layers}
        if len(lengths) == 1 and 0 < (length := int(lengths.pop())) <= len(ids):
            self._cache, self._ids = cache, ids[:length]

    def forget(self) -> None:
        """Give the memory back."""
        self._cache, self._ids, self.reused = None, [], 0


def _holds_keys(layer: Any) -> bool:
    """Whether a layer keeps keys and values alone, so that its length is that of its tokens."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def _common(one: list[int], other: list[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    for at, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return at
    return min(len(one), len(other))


def _cut(cache: Any, length: int, kept: int) -> bool:
    """Cut a cache of ``length`` tokens down to ``kept``, if every layer has all of their keys."""
    layers = cache.layers
    if any(layer.is_sliding for layer in layers):
        return False
    with torch.inference_mode(False), torch.no_grad():
        cache.crop(kept - length)
    return all(layer.get_seq_length() == kept for layer in layers)
