"""Minus recent score: the router's recent weights."""

from __future__ import annotations

import numpy as np

from planner.decide.policy import Ids, Policy, Values
from planner.errors import CapacityError


class MRS(Policy):
    """Minus recent score (HybriMoE, arXiv 2504.05897, section IV-D).

    After each step ``S <- alpha * TopP(s) + (1 - alpha) * S``, with s the router's probabilities
    of the step; keep the highest S. The caller decides what TopP holds by how many ids it passes:
    the paper keeps twice as many as are activated; a trace often records only those.
    """

    name = "mrs"

    def __init__(self, layers: int, experts: int, alpha: float = 0.5) -> None:
        super().__init__(layers, experts)
        if not 0 < alpha <= 1:
            raise CapacityError(
                f"MRS has alpha {alpha!r}",
                hint="alpha is above 0 and at most 1; the paper's is 0.5",
            )
        self._alpha = alpha
        self._score = np.zeros((layers, experts))

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        self._score[layers] *= 1 - self._alpha
        self._score[layers[:, None], ids] += self._alpha * weights

    def inform(self, uses: Values, tokens: int) -> None:
        """Take the share of the tokens that used an expert for its score."""
        self._score[:] = uses / tokens

    def value(self, layers: Ids) -> Values:
        return self._score[layers]
