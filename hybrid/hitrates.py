"""How often a predicted expert is activated, by how far ahead and at which place it was named."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.selection import Ids

F64 = NDArray[np.float64]

#: Tokens that the prior counts for, and tokens after which old ones count half.
_PRIOR_TOKENS = 64
_MEMORY_TOKENS = 32_768
#: Width of the prior's slope from the likely to the unlikely, in multiples of A, by distance.
_WIDTH = (0.25, 0.4, 0.5)


class HitRates:
    """Chances of activation by (distance, rank), from a prior and what is counted.

    The prior falls from likely to unlikely around rank A, the wider the further ahead, and names A
    experts in all; it is assumed, and outweighed after some tokens.

    Parameters
    ----------
    distances
        Layers ahead, from 1.
    choices
        N, the ranks.
    top_k
        A, experts activated by a token.
    """

    def __init__(self, distances: int, choices: int, top_k: int) -> None:
        ranks = np.arange(choices) + 0.5
        widths = np.array(_WIDTH[:distances])[:, None] * max(1, top_k)
        fall = 1.0 / (1.0 + np.exp((ranks - top_k) / widths))
        self._prior = np.minimum(1.0, fall * (top_k / np.maximum(1e-9, fall.sum(1, keepdims=True))))
        self._hits = np.zeros((distances, choices))
        self._tokens = np.zeros(distances)
        self._rates = self._prior.copy()
        self._right = np.zeros(distances)
        self._chosen = np.zeros(distances)

    def chances(self, distance: int, order: Ids) -> F64:
        """Return the chance of each expert, ``[S, N]``, for ``order``, ``[S, N]``, best first."""
        rates = self._rates[distance - 1]
        chances = np.empty(order.shape)
        if len(order) == 1:
            chances[0, order[0]] = rates
        else:
            np.put_along_axis(chances, order, rates[None], axis=1)
        return chances

    def count(self, distance: int, order: Ids, chosen: Ids) -> None:
        """Count which places of ``order``, ``[S, N]``, the router has ``chosen``, ``[S, A]``."""
        at, top_k = distance - 1, chosen.shape[1]
        activated = np.zeros(order.shape)
        if len(order) == 1:
            activated[0, chosen[0]] = 1.0
            hits = activated[0, order[0]]
        else:
            np.put_along_axis(activated, chosen, 1.0, axis=1)
            hits = np.take_along_axis(activated, order, axis=1).sum(axis=0)
        self._right[at] += hits[:top_k].sum()
        self._chosen[at] += chosen.size
        self._hits[at] += hits
        self._tokens[at] += len(order)
        if self._tokens[at] > _MEMORY_TOKENS:
            self._hits[at] /= 2
            self._tokens[at] /= 2
        weight = self._tokens[at] + _PRIOR_TOKENS
        self._rates[at] = (self._hits[at] + _PRIOR_TOKENS * self._prior[at]) / weight

    def recall(self) -> dict[int, float]:
        """Return by distance the share of chosen experts that were among the first A ranks.

        Distances without any prediction are left out.
        """
        return {
            at + 1: float(self._right[at] / self._chosen[at])
            for at in range(len(self._chosen))
            if self._chosen[at]
        }
