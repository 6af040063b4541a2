"""Two moving averages of the routing weights."""

from __future__ import annotations

import numpy as np

from planner.decide.policy import Ids, Policy, Values

_TINY = 1e-30
"""Weights that sum to nothing are divided by this."""


class Blend(Policy):
    """Keep what the router weighed high lately, or has all along.

    Two moving averages of each expert's share of the routing weights, over some 3 and some 100
    tokens, are added as ``fast + LONG * slow``. A prompt counts for as many tokens as it has.
    Rates and ``LONG`` are fitted to recorded traces; on those it hits 1 to 4 points more often
    than MRS where every miss gets a slot, and from half a point less to 4 more where only worthy
    ones do (``hybrid bench planner``). ``Forecast`` hits more still, but takes ten times as long
    in every layer of every token, which costs more than its hits save.
    """

    name = "blend"
    RATES = np.array([0.3, 0.01])
    LONG = 3.0

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        # The slow average is kept LONG times as large.
        self._means = np.zeros((layers, 2, experts))
        self._value = np.zeros((layers, experts))
        self._token = self._rates(1)
        self._gains = self._token[1].ravel().tolist()

    def _rates(self, tokens: int) -> tuple[Values, Values]:
        """What is kept of both averages after ``tokens`` tokens and what is added, ``[2, 1]``."""
        keep = ((1 - self.RATES) ** tokens)[:, None]
        return keep, (1 - keep) * np.array([[1.0], [self.LONG]])

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        keep, gain = self._rates(tokens)
        share = weights / np.maximum(weights.sum(axis=1, keepdims=True), _TINY)
        self._means[layers] *= keep
        self._means[layers[:, None], :, ids] += share[..., None] * gain[:, 0]
        self._value[layers] = self._means[layers].sum(axis=1)

    def observe_one(self, layer: int, ids: Ids, weights: Values, tokens: int) -> None:
        means = self._means[layer]
        if tokens == 1:  # every layer of every step waits for it
            means *= self._token[0]
            fast, slow = means
            weight = weights.tolist()
            total = max(sum(weight), _TINY)
            fast_gain, slow_gain = self._gains
            for expert, one in zip(ids.tolist(), weight, strict=True):
                share = one / total
                fast[expert] += share * fast_gain
                slow[expert] += share * slow_gain
        else:
            keep, gain = self._rates(tokens)
            means *= keep
            means[:, ids] += weights / max(np.add.reduce(weights), _TINY) * gain
        np.add(means[0], means[1], out=self._value[layer])

    def value(self, layers: Ids) -> Values:
        return self._value[layers]

    def value_one(self, layer: int) -> Values:
        value: Values = self._value[layer]
        return value
