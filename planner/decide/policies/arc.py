"""Adaptive replacement."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from planner.decide.policy import Ids, Policy, Values


class ARC(Policy):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003), one for each layer.

    Experts used once since they came (``once``) and those used again (``again``) share the slots;
    ghosts remember who was evicted from which, and a ghost that is asked for again moves the
    target share of its list. The experts of one step are taken as requests one after the other.
    """

    name = "arc"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.opened([0] * layers)

    def opened(self, capacities: Sequence[int]) -> None:
        """Begin anew: what it knows is who is in the slots and who was."""
        self._capacities = tuple(capacities)
        self._target = [0.0] * self.layers
        # Each ordered from the least to the most recently used.
        self._once, self._again, self._once_ghosts, self._again_ghosts = (
            [OrderedDict[int, None]() for _ in range(self.layers)] for _ in range(4)
        )
        self._asked: list[list[int]] = [[] for _ in capacities]

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        for layer, row in zip(layers.tolist(), ids.tolist(), strict=True):
            self._asked[layer] = row
            for expert in row:
                self._request(layer, expert)

    def _request(self, layer: int, expert: int) -> None:
        once_ghosts, again_ghosts = self._once_ghosts[layer], self._again_ghosts[layer]
        if self._once[layer].pop(expert, 0) is None or expert in self._again[layer]:
            self._again[layer][expert] = None
            self._again[layer].move_to_end(expert)
        elif expert in once_ghosts:
            more = max(len(again_ghosts) / len(once_ghosts), 1.0)
            self._target[layer] = min(self._capacities[layer], self._target[layer] + more)
        elif expert in again_ghosts:
            less = max(len(once_ghosts) / len(again_ghosts), 1.0)
            self._target[layer] = max(0.0, self._target[layer] - less)

    def value(self, layers: Ids) -> Values:
        """Rank the residents in the order they would be evicted if nothing more happened.

        Above them are those that were just asked for and are not there: they are to get a slot.
        """
        value = np.full((len(layers), self.experts), -1.0)
        for row, layer in enumerate(layers.tolist()):
            once, again = list(self._once[layer]), list(self._again[layer])
            spare = max(0, len(once) - int(self._target[layer]))
            order = once[:spare] + again + once[spare:]
            value[row, self._asked[layer]] = len(order)
            value[row, order] = np.arange(len(order))
        return value

    def victim(self, layer: int, incoming: int, candidates: Sequence[int]) -> int:
        allowed = set(candidates)
        once = [expert for expert in self._once[layer] if expert in allowed]
        again = [expert for expert in self._again[layer] if expert in allowed]
        held, target = len(self._once[layer]), self._target[layer]
        from_once = held > target or (incoming in self._again_ghosts[layer] and held == target)
        # Pins may leave only the other list.
        return (once or again)[0] if from_once and held else (again or once)[0]

    def evicted(self, layer: int, expert: int) -> None:
        if self._once[layer].pop(expert, 0) is None:
            self._once_ghosts[layer][expert] = None
        else:
            del self._again[layer][expert]
            self._again_ghosts[layer][expert] = None

    def admitted(self, layer: int, expert: int) -> None:
        once, again = self._once[layer], self._again[layer]
        once_ghosts, again_ghosts = self._once_ghosts[layer], self._again_ghosts[layer]
        if once_ghosts.pop(expert, 0) is None or again_ghosts.pop(expert, 0) is None:
            again[expert] = None
            return
        capacity = self._capacities[layer]
        while once_ghosts and len(once) + len(once_ghosts) >= capacity:
            once_ghosts.popitem(last=False)
        while (
            again_ghosts
            and len(once) + len(again) + len(once_ghosts) + len(again_ghosts) >= 2 * capacity
        ):
            again_ghosts.popitem(last=False)
        once[expert] = None
