"""What to copy while the link is idle, before the router has asked for it.

The problem. A predictor gives, for each of the next layers, the probability p_e that expert e is
activated there. With h expected hits, the layer ends after E[M(H)], where M[h] is its makespan
at h hits and H is binomial with mean h. Fetching expert e into the slot of expert v changes h by
p_e - p_v, so fetching the n likeliest missing experts of layer m is worth

    V_m(n) = LASTING * (E M(h) - E M(h + sum_{i <= n} (p_i - p_{v_i}))),

with v_i the residents the cache would evict (p_v = 0 for a free slot). This is HybriMoE's impact
(arXiv 2504.05897, section IV-C) with the scheduler's own makespans. Choose how many to fetch for
each layer,

    maximise  sum_m V_m(n_m)   such that   sum_{m' <= m} n_{m'} * t <= idle link time before m,

a knapsack with a deadline for each layer, solved exactly over the number of copies, less what so
many copies cost the CPU that reads the same memory meanwhile.

In prefill nearly every expert is activated and what counts is how many tokens each gets: a copy
is worth the CPU time of the newcomer's expected tokens less that of the evicted one's.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.decide.cache import ExpertCache
from planner.errors import WorkError

WINDOW = 64
"""Resolved prefetches after which it is judged whether they pay."""

PAUSE = 1024
"""Layer steps for which nothing is prefetched after waste has won."""

LASTING = 2.0
"""What an expert saves while it stays, over what it saves in the step it was fetched for: fitted
to simulated runs on recorded traces, where 1 fetches too little and 3 too much."""

DOUBT = 8.0
FADING = 0.98
"""How many fetches it takes to doubt a predictor, and how much of the past one more leaves."""

FAR = 0.5
"""How likely an expert of a layer after the next must be: the layers between know better, and
what is not likelier than not is more often wasted than used."""

KNOTS = 64
"""Points of the curve of expected makespans for each hit."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """What is expected of a layer that has yet to run.

    Parameters
    ----------
    layer
        Its index.
    expected
        ``[E]`` from any predictor: each expert's probability of being activated there; in prefill
        the tokens it will get.
    idle_s
        Idle link time from now until the layer's experts start.
    """

    layer: int
    expected: NDArray[np.float64]
    idle_s: float


class Prefetch(NamedTuple):
    """One expert to copy ahead of its layer, and who must go; None leaves that to the cache."""

    layer: int
    expert: int
    evicting: int | None = None


class _Record:
    """How fetches at one distance (0 for the next layer) fared."""

    def __init__(self) -> None:
        self.paused = 0
        """Layer steps for which nothing is fetched at this distance."""
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._given = 0.0
        self._found = 0.0

    @property
    def trust(self) -> float:
        """How much of the missing experts' probabilities came true, of late; 1 at first.

        Predictors are right about the residents too, of which nothing is fetched; about who is
        missing they are wrong more often.
        """
        return min(1.0, (self._found + DOUBT) / (self._given + DOUBT))

    def add(self, p: float, used: bool) -> None:
        """Take in that an expert fetched for its probability ``p`` was used, or not."""
        self._given = FADING * self._given + p
        self._found = FADING * self._found + used
        self._recent.append(used)
        kept = sum(self._recent)
        if len(self._recent) == WINDOW and LASTING * kept < WINDOW - kept:
            self._recent.clear()
            self.paused = PAUSE


class NoPrefetch:
    """Fetch nothing ahead, and account for it.

    The caller copies what the choice returns, admits and pins it, and tells ``resolve`` what the
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
        self.missed = 0
        # Of every layer, what was fetched for it: how many layers early, and how likely.
        self._waiting: dict[int, dict[int, tuple[int, float]]] = {}

    def choose(
        self, ahead: Sequence[Ahead], cache: ExpertCache, price_s: Sequence[float] = ()
    ) -> tuple[Prefetch, ...]:
        """Return what to copy now in decode, in the order to copy it: nothing."""
        return ()

    def choose_for_prompt(
        self,
        ahead: Ahead,
        cache: ExpertCache,
        cpu_s: Callable[[int], float],
        price_s: Sequence[float] = (),
    ) -> tuple[Prefetch, ...]:
        """Return what to copy now in prefill, in the order to copy it: nothing."""
        return ()

    def resolve(self, layer: int, activated: Collection[int], misses: int = 0) -> frozenset[int]:
        """Take what the router of ``layer`` chose, and how many of those were not resident.

        Returns the prefetched experts, now resolved.
        """
        self.missed += misses
        if layer not in self._waiting:
            return frozenset()
        waiting = frozenset(self._waiting.pop(layer))
        used = len(waiting.intersection(activated))
        self.used += used
        self.wasted += len(waiting) - used
        return waiting

    def forget(self, layer: int, expert: int) -> bool:
        """Take back a fetch that failed; return whether its router had yet to answer."""
        return self._waiting.get(layer, {}).pop(expert, None) is not None

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
    def active(self) -> bool:
        """Whether it fetches at present; without a rule it has nothing to pause."""
        return True

    @property
    def prefetch_precision(self) -> float:
        """Used over resolved fetches; 0 when there were none."""
        resolved = self.used + self.wasted
        return self.used / resolved if resolved else 0.0

    @property
    def prefetch_coverage(self) -> float:
        """Misses avoided over all there would have been; 0 when there were none."""
        misses = self.used + self.missed
        return self.used / misses if misses else 0.0


class ValuePrefetch(NoPrefetch):
    """Fetch what is worth more than what it evicts, as much as the idle link carries.

    It judges itself by its last ``WINDOW`` fetches at each distance: when those wasted outweigh
    what the others save while they stay, it pauses there for ``PAUSE`` layer steps and starts
    with a clean record.

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
        knots = np.arange(self._top_k * KNOTS + 2) / KNOTS
        self._curve: list[float] = self.expected_s(knots).tolist()
        self._records: defaultdict[int, _Record] = defaultdict(_Record)

    @property
    def active(self) -> bool:
        """Whether it prefetches for the next layer at present."""
        return not self._records[0].paused

    def choose(
        self, ahead: Sequence[Ahead], cache: ExpertCache, price_s: Sequence[float] = ()
    ) -> tuple[Prefetch, ...]:
        """Return what to copy now, in the order to copy it; nothing where nothing is worth it.

        Parameters
        ----------
        ahead
            The next layers, in the order they will run, with their experts' probabilities.
        price_s
            What 0, 1, ... copies cost all together, ascending; nothing beyond the last named.

        Raises
        ------
        WorkError
            When a later layer has less idle time before it than an earlier one.
        """
        room = [self._copies(layer) for layer in ahead]
        if room != sorted(room):
            raise WorkError(
                f"idle link time before layers {[a.layer for a in ahead]} falls: "
                f"{[a.idle_s for a in ahead]}",
                hint="give layers in the order they run, each with the idle time until it starts",
            )
        options: list[tuple[list[int], list[float]]] = []
        wanted = 0
        for distance, (layer, most) in enumerate(zip(ahead, room, strict=True)):
            # Nearer layers come first: what they leave of the link is for the others.
            if wanted < most and not self._records[distance].paused:
                options.append(self._worth(layer, most, cache, distance))
                wanted += len(options[-1][1]) - 1
            else:
                options.append(([], [0.0]))
        counts = _knapsack([worth for _, worth in options], room, price_s)
        return self._fetch(ahead, [experts for experts, _ in options], counts)

    def choose_for_prompt(
        self,
        ahead: Ahead,
        cache: ExpertCache,
        cpu_s: Callable[[int], float],
        price_s: Sequence[float] = (),
    ) -> tuple[Prefetch, ...]:
        """Return what to copy under a layer's prefill for the next, in the order to copy it.

        Parameters
        ----------
        ahead
            The next layer, with the tokens its experts will get.
        cpu_s
            The CPU time of one expert by load.
        price_s
            As of ``choose``.
        """
        most = self._copies(ahead)
        if not self.active or not most:
            return ()
        tokens = ahead.expected.tolist()
        saved_s = [n * cpu_s(1) if n < 1 else cpu_s(round(n)) for n in tokens]
        held = cache.residency(ahead.layer)
        experts = [expert for expert in range(len(tokens)) if expert not in held]
        experts.sort(key=tokens.__getitem__, reverse=True)
        worth = [0.0]
        losers = self._losers(ahead.layer, most, cache, tokens)
        for expert, loser in zip(experts, losers, strict=False):
            worth.append(worth[-1] + saved_s[expert] - (0.0 if loser is None else saved_s[loser]))
        chosen = self._fetch([ahead], [experts], _knapsack([worth], [most], price_s))
        return tuple(
            fetch._replace(evicting=loser) for fetch, loser in zip(chosen, losers, strict=False)
        )

    def resolve(self, layer: int, activated: Collection[int], misses: int = 0) -> frozenset[int]:
        for record in self._records.values():
            if record.paused:
                record.paused -= 1
        for expert, (distance, p) in sorted(self._waiting.get(layer, {}).items()):
            self._records[distance].add(p, expert in activated)
        return super().resolve(layer, activated, misses)

    def expected_s(self, hits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the layer's expected makespan at each expected number of hits, ``[n]``."""
        each = np.arange(self._top_k + 1)
        ways = np.array([math.comb(self._top_k, h) for h in each], dtype=np.float64)
        q = np.clip(hits / self._top_k, 0.0, 1.0)[:, None]
        expected: NDArray[np.float64] = ways * q**each * (1 - q) ** each[::-1] @ self._makespan_s
        return expected

    def _expect_s(self, hits: float) -> float:
        """``expected_s`` of one number of hits, read off a curve of ``KNOTS`` points a hit."""
        at = min(max(hits, 0.0), self._top_k) * KNOTS
        knot = int(at)
        low, high = self._curve[knot : knot + 2]
        return low + (at - knot) * (high - low)

    def _copies(self, layer: Ahead) -> int:
        """How many copies end before the layer starts; never more than anyone could want."""
        most = len(layer.expected)
        return min(most, int(max(0.0, layer.idle_s) / self._copy_s))

    def _worth(
        self, layer: Ahead, most: int, cache: ExpertCache, distance: int
    ) -> tuple[list[int], list[float]]:
        """Return the layer's missing experts, likeliest first, and V(n) for n = 0, 1, ..."""
        held = cache.residency(layer.layer)
        trust = self._records[distance].trust
        least = FAR / trust if distance else self._top_k / (2 * len(layer.expected))
        likely = (layer.expected > least).nonzero()[0].tolist()
        missing = [expert for expert in likely if expert not in held]
        worth = [0.0]
        if missing:
            p = layer.expected.tolist()
            missing.sort(key=p.__getitem__, reverse=True)
            most = min(most, len(missing))
            losers = self._losers(layer.layer, most, cache, cache.value(layer.layer).tolist())
            hits = sum(map(p.__getitem__, held))
            now_s = self._expect_s(hits)
            for expert, loser in zip(missing, losers, strict=False):
                hits += trust * p[expert] - (0.0 if loser is None else p[loser])
                worth.append(LASTING * (now_s - self._expect_s(hits)))
        return missing, worth

    @staticmethod
    def _losers(
        layer: int, most: int, cache: ExpertCache, value: Sequence[float]
    ) -> list[int | None]:
        """Return who would have to go for 1, 2, ... ``most`` newcomers, least ``value`` first.

        None stands for a free slot. Earlier fetches that have not met their layer yet are the
        caller's pins: nobody evicts them.
        """
        free = min(most, cache.free(layer))
        going = sorted(cache.evictable(layer), key=value.__getitem__) if free < most else []
        return [None] * free + going[: most - free]

    def _fetch(
        self, ahead: Sequence[Ahead], experts: Sequence[list[int]], counts: Sequence[int]
    ) -> tuple[Prefetch, ...]:
        """Take the first experts of each layer, and keep account of them."""
        chosen = []
        for distance, (layer, ids, count) in enumerate(zip(ahead, experts, counts, strict=True)):
            for expert in ids[:count]:
                chosen.append(Prefetch(layer.layer, expert))
                p = min(1.0, float(layer.expected[expert]))
                self._waiting.setdefault(layer.layer, {})[expert] = distance, p
        self.fetched += len(chosen)
        return tuple(chosen)


def _knapsack(
    worth: Sequence[Sequence[float]], room: Sequence[int], price: Sequence[float] = ()
) -> list[int]:
    """Return how many items to take of each group for the greatest total worth.

    Parameters
    ----------
    worth
        For each group, the worth of its first 0, 1, ... items; 0 for none.
    room
        The most items of a group and all groups before it; ascending.
    price
        What 0, 1, ... items of all groups cost together, ascending; no more beyond the last.

    Returns
    -------
    list of int
        Among equals, the fewest items, of the first groups first.
    """
    best = [0.0]  # best[c]: greatest worth with c items so far
    choices: list[list[int]] = []
    for values, most in zip(worth, room, strict=True):
        # More items than the best number of them are never better.
        wanted = max(range(min(len(values), most + 1)), key=values.__getitem__)
        if not choices:  # nothing to share with
            best, choices = list(values[: wanted + 1]), [list(range(wanted + 1))]
            continue
        size = min(most, len(best) + wanted - 1) + 1
        found, choice = [-math.inf] * size, [0] * size
        for count in range(wanted + 1):
            gain = values[count]
            for at, before in enumerate(best[: size - count], start=count):
                if before + gain > found[at]:
                    found[at], choice[at] = before + gain, count
        best = found
        choices.append(choice)
    if price:
        best = [gain - price[min(c, len(price) - 1)] for c, gain in enumerate(best)]
    left = best.index(max(best))
    counts = []
    for choice in reversed(choices):
        counts.append(choice[left])
        left -= counts[-1]
    return counts[::-1]
