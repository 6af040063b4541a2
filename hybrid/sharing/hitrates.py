"""How often a predicted expert is activated, by how far ahead and at which place it was named."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hybrid.anatomy.routers import Ids

F64 = NDArray[np.float64]

# A token counts once for every layer.
#: Tokens that the prior counts for, and tokens after which old ones count half.
_PRIOR_TOKENS = 64
_MEMORY_TOKENS = 32_768
#: What is counted enters the chances after this many tokens.
_REFRESH_TOKENS = 32
#: Width of the prior's slope from the likely to the unlikely, in multiples of A, by distance.
_WIDTH = (0.25, 0.4, 0.5)


class HitRates:
    """Chances of activation by (distance, rank), from a prior and what is counted.

    The prior falls from likely to unlikely around rank A, the wider the further ahead, and names A
    experts in all; it is assumed, and outweighed after some tokens.

    Parameters
    ----------
    choices
        N, the ranks.
    top_k
        A, experts activated by a token.
    """

    def __init__(self, choices: int, top_k: int) -> None:
        ranks = np.arange(choices) + 0.5
        widths = np.array(_WIDTH)[:, None] * max(1, top_k)
        fall = 1.0 / (1.0 + np.exp((ranks - top_k) / widths))
        named = np.maximum(1e-9, fall.sum(1, keepdims=True))
        self._prior = np.minimum(1.0, fall * (top_k / named))
        self._rates = self._prior.copy()
        self._hits = np.zeros_like(self._prior)
        distances = len(_WIDTH)
        self._rows = np.arange(distances)[:, None]
        self._tokens = [0.0] * distances
        self._new = [0] * distances
        self._top_k = top_k

    def chances(self, order: Ids) -> F64:
        """Return every token's chances, ``[M, S, N]``.

        Parameters
        ----------
        order
            ``[M, S, N]`` experts, best first, of the layers at distances 1 to M.
        """
        chances = np.empty(order.shape)
        if order.shape[1] == 1:
            chances[self._rows[: len(order)], 0, order[:, 0]] = self._rates[: len(order)]
        else:
            np.put_along_axis(chances, order, self._rates[: len(order), None], axis=2)
        return chances

    def count(self, orders: Mapping[int, Ids], chosen: Ids) -> None:
        """Count which places the router has ``chosen``, ``[S, A]``.

        Parameters
        ----------
        orders
            ``[S, N]`` experts, best first, by distance.
        """
        if len(chosen) == 1:
            activated = np.zeros(self._hits.shape[1])
            activated[chosen[0]] = 1.0
            for distance, order in orders.items():
                self._hits[distance - 1] += activated[order[0]]
        else:
            activated = np.zeros((len(chosen), self._hits.shape[1]))
            np.put_along_axis(activated, chosen, 1.0, axis=1)
            for distance, order in orders.items():
                places = np.take_along_axis(activated, order, axis=1)
                self._hits[distance - 1] += places.sum(axis=0)
        for distance in orders:
            self._new[distance - 1] += len(chosen)
            if self._new[distance - 1] >= _REFRESH_TOKENS:
                self._refresh(distance - 1)

    def recall(self) -> dict[int, float]:
        """Return by distance the share of chosen experts that were among the first A ranks.

        Distances without any prediction are left out. Old tokens count less than new ones.
        """
        chosen = self._hits.sum(axis=1)
        right = self._hits[:, : self._top_k].sum(axis=1)
        return {at + 1: float(right[at] / chosen[at]) for at in np.flatnonzero(chosen).tolist()}

    def _refresh(self, at: int) -> None:
        self._tokens[at] += self._new[at]
        self._new[at] = 0
        if self._tokens[at] > _MEMORY_TOKENS:
            self._hits[at] /= 2
            self._tokens[at] /= 2
        known = self._hits[at] + _PRIOR_TOKENS * self._prior[at]
        self._rates[at] = known / (self._tokens[at] + _PRIOR_TOKENS)
