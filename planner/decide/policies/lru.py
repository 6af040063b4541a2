"""Least recently used."""

from __future__ import annotations

import numpy as np

from planner.decide.policy import Ids, Policy, Values


class LRU(Policy):
    """Keep what was used last; the experts of one step count as used in the order given."""

    name = "lru"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._last = np.zeros((layers, experts))
        self._now = np.zeros((layers, 1))

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        self._last[layers[:, None], ids] = self._now[layers] + np.arange(1, ids.shape[1] + 1)
        self._now[layers] += ids.shape[1]

    def inform(self, uses: Values, tokens: int) -> None:
        """Take it that the most used was used last."""
        for layer, counts in enumerate(uses):
            self.observe_one(layer, np.argsort(counts, kind="stable"), counts, 1)

    def value(self, layers: Ids) -> Values:
        value: Values = self._last[layers]
        return value
