"""Keeps the cache of a conversation's last turn, from which the next one goes on."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


class _Mark(NamedTuple):
    """How layers with a window were after so many tokens; None for the others, which can be cut."""

    tokens: int
    layers: list[Any]


class KeptCache:
    """Keys and values of one sequence, kept between calls.

    Where the next prompt goes another way, as after thoughts that are not sent again, what follows
    the common beginning is cut off. Layers with a window that was exceeded have no earlier keys:
    they go back to how they were after the last prompt, if that is common, and else all is computed
    anew. A model with a state instead of keys in some layers is always computed anew.

    Attributes
    ----------
    reused
        Tokens of the last prompt that were in it already.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []
        self._mark: _Mark | None = None
        self.reused = 0

    def begin(self, network: Any, ids: Tensor) -> Any:
        """Return the cache to compute a prompt ``[1, T]`` with; None: transformers makes its own.

        It is this object's alone until :meth:`end`, so that a call that is broken off leaves none.
        """
        cache, known, mark, prompt = self._cache, self._ids, self._mark, ids[0].tolist()
        self.forget()
        # One token has to be computed: its logits are asked for.
        alike = _common(known, prompt[:-1])
        if cache is not None and alike:
            if alike == len(known) or _cut(cache, alike):
                self.reused = alike
                return cache
            if mark is not None and mark.tokens <= alike:
                self.reused = mark.tokens
                return _gone_back(cache, mark)
        if not network._supports_default_dynamic_cache():
            return None
        fresh = DynamicCache(config=network.config.get_text_config(decoder=True))
        return fresh if all(map(_holds_keys, fresh.layers)) else None

    def prompt_done(self, cache: Any, tokens: int) -> None:
        """Note how a ``cache`` is that holds a prompt of so many tokens, and nothing else."""
        layers = getattr(cache, "layers", ())
        sliding = [layer for layer in layers if layer.is_sliding]
        recorded = any(getattr(layer, "record_past", False) for layer in sliding)
        if sliding and not recorded and {layer.get_seq_length() for layer in layers} == {tokens}:
            kept = [copy.copy(layer) if layer.is_sliding else None for layer in layers]
            self._mark = _Mark(tokens, kept)

    def end(self, cache: Any, ids: list[int]) -> None:
        """Keep a ``cache`` of a sequence that begins with it; ``ids`` are all tokens of that.

        Of a sequence that was broken off, layers may hold more than others, or than ``ids``: those
        are cut, or go back to where the prompt ended.
        """
        layers = getattr(cache, "layers", ())
        if not layers or not all(map(_holds_keys, layers)):
            return
        lengths = {length for layer in layers for length in _lengths(layer)}
        length = min(*lengths, len(ids)) if lengths else 0
        if not length:
            return
        if lengths != {length} and not _cut(cache, length):
            if self._mark is None or self._mark.tokens > length:
                return
            length, cache = self._mark.tokens, _gone_back(cache, self._mark)
        self._cache, self._ids = cache, ids[:length]

    def forget(self) -> None:
        """Give the memory back."""
        self._cache, self._ids, self._mark, self.reused = None, [], None, 0


def _holds_keys(layer: Any) -> bool:
    """Whether a layer keeps keys and values alone, so that its length is that of its tokens."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def _lengths(layer: Any) -> set[int]:
    """Return the tokens of a layer's keys and of its values: one number, unless it was broken off.

    A layer with a window, or in the one-token kernels' hands, says how many there were.
    """
    if type(layer) is not DynamicLayer:
        return {int(layer.get_seq_length())}
    both = (layer.keys, layer.values)
    return {0 if side is None or not side.numel() else int(side.shape[-2]) for side in both}


def _common(one: list[int], other: list[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    for at, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return at
    return min(len(one), len(other))


def _cut(cache: Any, kept: int) -> bool:
    """Cut all layers down to ``kept`` tokens, if each has all of their keys."""
    if not all(_can_be_cut(layer, kept) for layer in cache.layers):
        return False
    _crop(cache.layers, kept)
    return all(_lengths(layer) == {kept} for layer in cache.layers)


def _can_be_cut(layer: Any, kept: int) -> bool:
    """Whether a layer holds the keys of all tokens up to ``kept``: of a window, none were left."""
    length = layer.get_seq_length()
    return bool(kept == length or not layer.is_sliding or length < layer.sliding_window)


def _crop(layers: list[Any], kept: int) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            if (more := layer.get_seq_length() - kept) > 0:
                layer.crop(-more)


def _gone_back(cache: Any, mark: _Mark) -> Any:
    """Return a cache of the tokens that a mark is of."""
    found, layers = DynamicCache(), []
    for layer, then in zip(cache.layers, mark.layers, strict=True):
        layers.append(copy.copy(layer if then is None else then))
        if then is None:
            _crop(layers[-1:], mark.tokens)
    found.layers = layers
    return found
