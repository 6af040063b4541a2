"""A set that was counted beforehand and never changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.decide.policy import Ids, Policy, Values
from planner.errors import CapacityError


class StaticPopularity(Policy):
    """Keep the experts that were popular when somebody counted (Fiddler, arXiv 2402.07033).

    Parameters
    ----------
    counts
        Uses of each expert in the sample, ``[L, E]``; without any, who comes first stays.

    Raises
    ------
    CapacityError
        When ``counts`` has another shape.
    """

    name = "static"

    def __init__(self, layers: int, experts: int, counts: ArrayLike | None = None) -> None:
        super().__init__(layers, experts)
        none = np.zeros((layers, experts))
        self._counts = none if counts is None else np.asarray(counts, dtype=np.float64)
        if self._counts.shape != (layers, experts):
            raise CapacityError(
                f"counts are {list(self._counts.shape)}, the model is [{layers}, {experts}]",
                hint="count the uses of every expert of every layer",
            )

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        """Learn nothing: that is the point."""

    def inform(self, uses: Values, tokens: int) -> None:
        """Count what earlier sessions used."""
        self._counts = self._counts + uses

    def value(self, layers: Ids) -> Values:
        return self._counts[layers]
