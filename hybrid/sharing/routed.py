"""Holds what a router chose, as the planner counts it and as the kernels take it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
F32 = NDArray[np.float32]


class RoutedTokens:
    """What a router chose in one step.

    Parameters
    ----------
    ids, factors
        Expert ids and routing weights, ``[T, A]``; ids outside ``[0, experts)`` stand for none.
    experts
        E of the layer.

    Attributes
    ----------
    loads
        ``(expert, tokens)`` of the activated experts, ids ascending.
    activated, weights
        Their ids, and the mean routing weight of each over all tokens.
    """

    def __init__(self, ids: Ids, factors: F32, experts: int) -> None:
        self.factors = factors
        self._experts = experts
        # Of a single token whose experts all differ: their weights.
        self._single: dict[int, float] | None = None
        self.loads: tuple[tuple[int, int], ...]
        self.weights: Sequence[float]
        if len(ids) == 1:
            (row,), (given,) = ids.tolist(), factors.tolist()
            single = dict(zip(row, given, strict=True))
            if len(single) == len(row):
                chosen = sorted(single)
                if chosen[0] < 0 or chosen[-1] >= experts:
                    chosen = [expert for expert in chosen if 0 <= expert < experts]
                self._single, self.activated = single, chosen
                self.loads = tuple([(expert, 1) for expert in chosen])
                self.weights = [single[expert] for expert in chosen]
                return
        valid = (ids >= 0) & (ids < experts)
        self._known = np.where(valid, ids, experts)  # those that stand for none are one more
        flat = ids[valid]
        counts = np.bincount(flat, minlength=experts)
        used = np.flatnonzero(counts)
        self.activated = used.tolist()
        self.loads = tuple(zip(self.activated, counts[used].tolist(), strict=True))
        weights = np.bincount(flat, weights=factors[valid], minlength=experts)[used]
        self.weights = (weights / len(ids)).tolist()

    def among(
        self, experts: Sequence[int], places: Sequence[int]
    ) -> tuple[Ids | list[int], F32 | list[float]]:
        """Return ids and routing weights with ``places`` for ``experts`` and -1 for all others.

        Where a single token chose them, both are lists of these experts alone.
        """
        single = self._single
        if single is not None:
            return list(places), [single[expert] for expert in experts]
        table = np.full(self._experts + 1, -1, np.int32)
        table[list(experts)] = places
        return table[self._known], self.factors
