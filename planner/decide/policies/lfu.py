"""Least frequently used."""

from __future__ import annotations

import numpy as np

from planner.decide.policies.lru import LRU
from planner.decide.policy import Ids, Policy, Values


class LFU(Policy):
    """Keep what was used most often; ties by the last use."""

    name = "lfu"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._uses = np.zeros((layers, experts))
        self._last = LRU(layers, experts)

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        self._uses[layers[:, None], ids] += 1.0
        self._last.observe(layers, ids, weights, tokens)

    def inform(self, uses: Values, tokens: int) -> None:
        self._uses += uses

    def value(self, layers: Ids) -> Values:
        last = self._last.value(layers)
        value: Values = self._uses[layers] + last / (last.max(axis=1, keepdims=True) + 1.0)
        return value
