"""What a cache policy is: it watches what the router chooses and says what each expert is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Values = NDArray[np.float64]


class Policy:
    """What each expert of each layer is worth keeping.

    Events and answers are batched over layers, so that a recorded trace replays fast; a running
    model passes one layer at a time. What happens in one layer says nothing about another.

    Parameters
    ----------
    layers, experts
        L and E of the model.
    """

    name: ClassVar[str]

    def __init__(self, layers: int, experts: int) -> None:
        self.layers = layers
        self.experts = experts

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        """Learn what the router chose in one step.

        Parameters
        ----------
        layers
            Which layers, ``[n]``, each at most once.
        ids, weights
            The activated experts, ``[n, A]``, each once a row, and their routing weights. In
            prefill a row holds every expert that got a token, and its weight averaged over all
            tokens of the step.
        tokens
            How many tokens the step routed.
        """
        raise NotImplementedError

    def value(self, layers: Ids) -> Values:
        """Return what each expert is worth keeping, ``[n, E]``: only the order matters."""
        raise NotImplementedError

    def observe_one(self, layer: int, ids: Ids, weights: Values, tokens: int) -> None:
        """``observe`` for a single layer, ids and weights ``[A]``: what a running model does."""
        self.observe(np.array([layer]), ids[None], weights[None], tokens)

    def value_one(self, layer: int) -> Values:
        """``value`` of a single layer, ``[E]``."""
        value: Values = self.value(np.array([layer]))[0]
        return value

    def victim(self, layer: int, incoming: int, candidates: Sequence[int]) -> int:
        """Return whom of ``candidates``, ids ascending, to evict for ``incoming``.

        The one of least value, among equals the lowest id.
        """
        return candidates[int(self.value_one(layer).take(candidates).argmin())]

    @property
    def evicts_least(self) -> bool:
        """Whether the victim is always who has the least value, whoever comes."""
        return type(self).victim is Policy.victim

    def inform(self, uses: Values, tokens: int) -> None:
        """Learn from earlier sessions, before the first step: a long step that used every expert.

        Parameters
        ----------
        uses
            How often each expert was used, ``[L, E]``.
        tokens
            By how many tokens.
        """
        every = np.arange(self.experts)
        for layer, counts in enumerate(uses):
            self.observe_one(layer, every, counts, tokens)

    def opened(self, capacities: Sequence[int]) -> None:
        """Learn how many slots each layer has, ``[L]``, and that nothing is in them.

        So it is again when a device is opened anew: what was learned about the experts stays true.
        Most policies do not care.
        """

    def admitted(self, layer: int, expert: int) -> None:
        """Learn that ``expert`` got a slot; most policies do not care."""

    def evicted(self, layer: int, expert: int) -> None:
        """Learn that ``expert`` lost its slot; most policies do not care."""
