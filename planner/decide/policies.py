"""What to keep: the textbook's answers and the field's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from planner.decide.cache import Ids, Policy, Values
from planner.errors import CapacityError

_TINY = 1e-30
"""Weights that sum to nothing are divided by this."""


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

    def value(self, layers: Ids) -> Values:
        value: Values = self._last[layers]
        return value


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

    def value(self, layers: Ids) -> Values:
        last = self._last.value(layers)
        value: Values = self._uses[layers] + last / (last.max(axis=1, keepdims=True) + 1.0)
        return value


class StaticPopularity(Policy):
    """Keep the experts that were popular when somebody counted (Fiddler, arXiv 2402.07033).

    Parameters
    ----------
    counts
        Uses of each expert in the sample, ``[L, E]``.

    Raises
    ------
    CapacityError
        When ``counts`` has another shape.
    """

    name = "static"

    def __init__(self, layers: int, experts: int, counts: ArrayLike) -> None:
        super().__init__(layers, experts)
        self._counts = np.asarray(counts, dtype=np.float64)
        if self._counts.shape != (layers, experts):
            raise CapacityError(
                f"counts are {list(self._counts.shape)}, the model is [{layers}, {experts}]",
                hint="count the uses of every expert of every layer",
            )

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        """Learn nothing: that is the point."""

    def value(self, layers: Ids) -> Values:
        return self._counts[layers]


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

    def value(self, layers: Ids) -> Values:
        return self._score[layers]


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


class ARC(Policy):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003), one for each layer.

    Experts used once since they came (``once``) and those used again (``again``) share the slots;
    ghosts remember who was evicted from which, and a ghost that is asked for again moves the
    target share of its list. The experts of one step are taken as requests one after the other.

    Parameters
    ----------
    capacities
        Slots of each layer, ``[L]``.
    """

    name = "arc"

    def __init__(self, layers: int, experts: int, capacities: Sequence[int]) -> None:
        super().__init__(layers, experts)
        self._capacities = tuple(capacities)
        self._target = [0.0] * layers
        # Each ordered from the least to the most recently used.
        self._once, self._again, self._once_ghosts, self._again_ghosts = (
            [OrderedDict[int, None]() for _ in range(layers)] for _ in range(4)
        )

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        for layer, row in zip(layers.tolist(), ids.tolist(), strict=True):
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
        """Rank the residents in the order they would be evicted if nothing more happened."""
        value = np.full((len(layers), self.experts), -1.0)
        for row, layer in enumerate(layers.tolist()):
            once, again = list(self._once[layer]), list(self._again[layer])
            spare = max(0, len(once) - int(self._target[layer]))
            order = once[:spare] + again + once[spare:]
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
