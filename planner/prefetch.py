"""What to copy while the link is idle, before the router has asked for it.

The problem. A predictor gives, for each of the next layers, the probability p_e that expert e is
activated there. With h expected hits, the layer ends after E[M(H)], where M[h] is its makespan
at h hits and H is binomial with mean h. Fetching expert e into the slot of expert v changes h by
p_e - p_v, so fetching the n likeliest missing experts of layer m is worth

    V_m(n) = E M(h) - E M(h + sum_{i <= n} (p_i - p_{v_i})),

with v_i the residents the cache would evict (p_v = 0 for a free slot). This is HybriMoE's impact
(arXiv 2504.05897, section IV-C) with the scheduler's own makespans. Choose how many to fetch for
each layer,

    maximise  sum_m V_m(n_m)   such that   sum_{m' <= m} n_{m'} * t <= idle link time before m,

a knapsack with a deadline for each layer, solved exactly over the number of copies.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cache import ExpertCache
from planner.errors import WorkError

WINDOW = 64
"""Resolved prefetches after which it is judged whether they pay."""

PAUSE = 1024
"""Layer steps for which nothing is prefetched after waste has won."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """What is expected of a layer that has yet to run.

    Parameters
    ----------
    layer
        Its index.
    probability
        Of each expert being activated there, ``[E]``, from any predictor.
    idle_s
        Idle link time from now until the layer's experts start.
    """

    layer: int
    probability: NDArray[np.float64]
    idle_s: float


@dataclass(frozen=True, slots=True)
class Prefetch:
    """One expert to copy ahead of its layer."""

    layer: int
    expert: int


class NoPrefetch:
    """Fetch nothing ahead, and account for it.

    The caller copies what ``choose`` returns, admits and pins it, and tells ``resolve`` what the
    router then chose; the pins end there, whether the prediction was right or wrong.

    Parameters
    ----------
    expert_bytes
        Size of one expert, for the account.
    """

    def __init__(self, expert_bytes: int = 0) -> None:
        self.expert_bytes = expert_bytes
        self.fetched = 0
        self.used = 0
        self.wasted = 0
        self._waiting: dict[int, set[int]] = {}

    def choose(self, ahead: Sequence[Ahead], cache: ExpertCache) -> tuple[Prefetch, ...]:
        """Return what to copy now, in the order to copy it: nothing."""
        return ()

    def resolve(self, layer: int, activated: Collection[int]) -> frozenset[int]:
        """Take what the router of ``layer`` chose; return the prefetched experts now resolved."""
        waiting = self._waiting.pop(layer, set())
        used = len(waiting.intersection(activated))
        self.used += used
        self.wasted += len(waiting) - used
        return frozenset(waiting)

    def forget(self, layer: int, expert: int) -> bool:
        """Take back a fetch that failed; return whether its router had yet to answer."""
        waiting = self._waiting.get(layer, set())
        found = expert in waiting
        waiting.discard(expert)
        return found

    def abandon(self) -> list[tuple[int, int]]:
        """Wait for no router any more; return layer and id of every fetch that was unresolved."""
        unresolved = self.unresolved()
        self._waiting.clear()
        return unresolved

    def unresolved(self) -> list[tuple[int, int]]:
        """Return layer and id of every fetch whose router has yet to answer."""
        return [(layer, e) for layer, ids in self._waiting.items() for e in sorted(ids)]

    @property
    def useful_bytes(self) -> int:
        """Bytes fetched ahead of a use."""
        return self.used * self.expert_bytes

    @property
    def wasted_bytes(self) -> int:
        """Bytes fetched for nothing."""
        return self.wasted * self.expert_bytes

    @property
    def prefetch_precision(self) -> float:
        """Used over resolved fetches; 0 when there were none."""
        resolved = self.used + self.wasted
        return self.used / resolved if resolved else 0.0


class ValuePrefetch(NoPrefetch):
    """Fetch what is worth more than what it evicts, as much as the idle link carries.

    It judges itself by its last ``WINDOW`` fetches: when most were wasted it pauses for ``PAUSE``
    layer steps and starts with a clean record.

    Parameters
    ----------
    makespan_s
        The layer's makespan at h hits, ``[A + 1]`` for h = 0..A (``DecodeTable.by_hits``).
    copy_s
        Time to copy one expert.
    expert_bytes
        Size of one expert.

    Raises
    ------
    WorkError
        When there are fewer than two makespans, or ``copy_s`` is not positive.
    """

    def __init__(self, makespan_s: Sequence[float], copy_s: float, expert_bytes: int = 0) -> None:
        super().__init__(expert_bytes)
        if len(makespan_s) < 2 or not 0 < copy_s < math.inf:
            raise WorkError(
                f"prefetching needs a makespan for each number of hits and a copy time above 0, "
                f"got {len(makespan_s)} makespans and {copy_s!r} s",
                hint="take them from the decode table and the cost model",
            )
        self._copy_s = copy_s
        self._top_k = len(makespan_s) - 1
        self._makespan_s = np.asarray(makespan_s, dtype=np.float64)
        self._hits = np.arange(self._top_k + 1)
        self._ways = np.array([math.comb(self._top_k, h) for h in self._hits], dtype=np.float64)
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._paused = 0

    @property
    def active(self) -> bool:
        """Whether it prefetches at all at present."""
        return self._paused == 0

    def choose(self, ahead: Sequence[Ahead], cache: ExpertCache) -> tuple[Prefetch, ...]:
        """Return what to copy now, in the order to copy it; nothing where nothing is worth it.

        Parameters
        ----------
        ahead
            The next layers, in the order they will run.

        Raises
        ------
        WorkError
            When a later layer has less idle time before it than an earlier one.
        """
        if not self.active:
            return ()
        options = [self._worth(layer, cache) for layer in ahead]
        room = [self._copies(layer) for layer in ahead]
        if room != sorted(room):
            raise WorkError(
                f"idle link time before layers {[a.layer for a in ahead]} falls: "
                f"{[a.idle_s for a in ahead]}",
                hint="give layers in the order they run, each with the idle time until it starts",
            )
        chosen = [
            Prefetch(layer.layer, expert)
            for layer, (experts, _), count in zip(
                ahead, options, _knapsack([worth for _, worth in options], room), strict=True
            )
            for expert in experts[:count]
        ]
        for fetch in chosen:
            self._waiting.setdefault(fetch.layer, set()).add(fetch.expert)
        self.fetched += len(chosen)
        return tuple(chosen)

    def resolve(self, layer: int, activated: Collection[int]) -> frozenset[int]:
        if self._paused:
            self._paused -= 1
        waiting = super().resolve(layer, activated)
        self._recent.extend(expert in activated for expert in sorted(waiting))
        if len(self._recent) == WINDOW and 2 * sum(self._recent) < WINDOW:
            self._recent.clear()
            self._paused = PAUSE
        return waiting

    def expected_s(self, hits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the layer's expected makespan at each expected number of hits, ``[n]``."""
        q = np.clip(hits / self._top_k, 0.0, 1.0)[:, None]
        chance = self._ways * q**self._hits * (1 - q) ** (self._top_k - self._hits)
        expected: NDArray[np.float64] = chance @ self._makespan_s
        return expected

    def _copies(self, layer: Ahead) -> int:
        """How many copies end before the layer starts; never more than anyone could want."""
        most = len(layer.probability)
        return min(most, int(max(0.0, layer.idle_s) / self._copy_s))

    def _worth(self, layer: Ahead, cache: ExpertCache) -> tuple[list[int], NDArray[np.float64]]:
        """Return the layer's missing experts, likeliest first, and V(n) for n = 0, 1, ..."""
        if not self._copies(layer):
            return [], np.zeros(1)
        p = layer.probability
        held = cache.residency(layer.layer)
        free = cache.capacities[layer.layer] - len(held)
        value = cache.value(layer.layer)
        # Earlier fetches that have not met their layer yet are the caller's pins: not evictable.
        losers = sorted(cache.evictable(layer.layer), key=lambda expert: (value[expert], expert))
        count = min(self._copies(layer), free + len(losers), len(p) - len(held))
        order = np.argsort(-p, kind="stable").tolist()
        experts = [expert for expert in order if expert not in held][:count]
        lost = np.array([0.0] * free + [p[expert] for expert in losers])[:count]
        hits = float(p[sorted(held)].sum())
        after = hits + np.concatenate(([0.0], np.cumsum(p[experts] - lost)))
        expected_s = self.expected_s(after)
        return experts, expected_s[0] - expected_s


def _knapsack(worth: Sequence[NDArray[np.float64]], room: Sequence[int]) -> list[int]:
    """Return how many items to take of each group for the greatest total worth.

    Parameters
    ----------
    worth
        For each group, the worth of its first 0, 1, ... items.
    room
        The most items of a group and all groups before it; ascending.

    Returns
    -------
    list of int
        Among equals, the fewest items, of the first groups first.
    """
    best = np.zeros(1)  # best[c]: greatest worth with c items so far
    choices = []
    for values, most in zip(worth, room, strict=True):
        size = min(most, len(best) + len(values) - 2) + 1
        found = np.full(size, -np.inf)
        choice = np.zeros(size, dtype=np.int64)
        for count in range(min(len(values), size)):
            end = min(len(best), size - count)
            gained = best[:end] + values[count]
            better = gained > found[count : count + end]
            found[count : count + end][better] = gained[better]
            choice[count : count + end][better] = count
        best = found
        choices.append(choice)
    left = int(np.argmax(best))
    counts = []
    for choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= counts[-1]
    return counts[::-1]
