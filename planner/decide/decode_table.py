"""Decode's plans, made once: with equal loads only the counts of hits and misses matter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import LayerCost
from planner.decide.schedule import SEARCH_S, best_split, schedule
from planner.describe.estimate import LayerWork
from planner.errors import WorkError


class DecodeTable:
    """Plans for up to ``top_k`` experts of equal load, looked up by (hits, misses).

    Parameters
    ----------
    cost
        The cost model; the table is for this one and must be rebuilt when it changes.
    top_k
        The most experts a layer activates for one token.
    load
        Tokens sent to each activated expert.
    gpu_free_s, link_free_s
        When the GPU and the link are free in the steps the table is made for.

    Raises
    ------
    WorkError
        When ``top_k`` or ``load`` is below 1.
    """

    def __init__(
        self,
        cost: LayerCost,
        top_k: int,
        *,
        load: int = 1,
        gpu_free_s: float = 0.0,
        link_free_s: float = 0.0,
        search_s: float = 0.0,
    ) -> None:
        if top_k < 1 or load < 1:
            raise WorkError(
                f"a decode table needs top_k and load of at least 1, got {top_k} and {load}",
                hint="take top_k from the model's configuration",
            )
        self.cost = cost
        self.top_k = top_k
        self.load = load
        self.gpu_free_s = gpu_free_s
        self.link_free_s = link_free_s
        self._search_s = search_s
        self._plans = {
            (hits, misses): self._first_ids(hits, misses, link_free_s)
            for hits in range(top_k + 1)
            for misses in range(top_k + 1 - hits)
        }
        # The same where the link is busy for so long that no copy helps.
        late_s = top_k * cost.cpu_s(load) + cost.cpu_start_s + gpu_free_s + cost.gpu_start_s
        self._uncopied = {
            (hits, misses): self._first_ids(hits, misses, late_s) for hits, misses in self._plans
        }

    def _first_ids(self, hits: int, misses: int, link_free_s: float) -> LayerPlan:
        """Plan the case with the hits as experts 0, 1, ... and the misses after them."""
        work = LayerWork(
            layer=0,
            loads=tuple((expert, self.load) for expert in range(hits + misses)),
            gpu_free_s=self.gpu_free_s,
            link_free_s=link_free_s,
        )
        return schedule(work, range(hits), self.cost)

    def makespan_s(self, hits: int, misses: int) -> float:
        """Return how long a layer takes at these counts.

        Raises
        ------
        WorkError
            When there are more experts than ``top_k``.
        """
        if hits < 0 or misses < 0 or hits + misses > self.top_k:
            raise WorkError(
                f"the decode table holds up to {self.top_k} experts, got {hits} hits and "
                f"{misses} misses",
                hint="build the table with a larger top_k",
            )
        return self._plans[hits, misses].makespan_s

    def by_hits(self) -> list[float]:
        """Return the makespan of ``top_k`` experts with 0, 1, ... ``top_k`` hits, in seconds."""
        return [self.makespan_s(hits, self.top_k - hits) for hits in range(self.top_k + 1)]

    def plan(self, work: LayerWork, hits: Sequence[int], misses: Sequence[int]) -> LayerPlan:
        """Return an optimal plan for a step whose experts are ``hits`` and ``misses``.

        Steps that the table was not made for (other loads, more experts, other free times of the
        lanes) are solved by the exact rule, which takes a few times as long, or by ``schedule``.
        """
        distinct = {load for _, load in work.loads} or {self.load}
        if len(distinct) > 1:
            return schedule(work, hits, self.cost, self._search_s)
        (load,) = distinct
        if len(work.loads) > self.top_k or load != self.load or work.gpu_free_s != self.gpu_free_s:
            return self._exact(work, load, [*hits], [*misses])
        found, link_end_s = self._plans[len(hits), len(misses)], work.link_free_s
        if link_end_s == self.link_free_s:
            link_end_s = found.link_end_s
        else:
            found = self._uncopied[len(hits), len(misses)]
            if link_end_s + self.cost.copy_s() + self.cost.gpu_s(load) < found.makespan_s:
                return self._exact(work, load, [*hits], [*misses])
        experts = (*hits, *misses)
        return LayerPlan(
            work.layer,
            tuple(sorted([experts[i] for i in found.cpu])),
            tuple([experts[i] for i in found.gpu]),
            tuple([experts[i] for i in found.copies]),
            found.cpu_end_s,
            found.gpu_end_s,
            link_end_s,
            found.lower_bound_s,
            found.method,
        )

    def _exact(self, work: LayerWork, load: int, hits: list[int], misses: list[int]) -> LayerPlan:
        """Apply ``exact_rule`` to experts that are all alike: only their numbers matter."""
        cost = self.cost
        cpu_s, gpu_s, copy_s = cost.cpu_s(load), cost.gpu_s(load), cost.copy_s()
        gpu_begin_s = work.gpu_free_s + cost.gpu_start_s
        on_gpu, copied = best_split(
            [cpu_s] * len(hits),
            [cpu_s] * len(misses),
            gpu_s=gpu_s,
            copy_s=copy_s,
            cpu_start_s=cost.cpu_start_s,
            gpu_begin_s=gpu_begin_s,
            link_free_s=work.link_free_s,
        )
        resident = hits[len(hits) - on_gpu :]
        copies = misses[len(misses) - copied :]
        cpu = sorted(hits[: len(hits) - on_gpu] + misses[: len(misses) - copied])
        cpu_end_s = cost.cpu_start_s if cpu else 0.0
        for _ in cpu:
            cpu_end_s += cpu_s
        gpu_end_s = gpu_begin_s if on_gpu + copied else work.gpu_free_s
        link_end_s = work.link_free_s
        for _ in resident:
            gpu_end_s += gpu_s
        for _ in copies:
            link_end_s += copy_s
            gpu_end_s = max(gpu_end_s, link_end_s) + gpu_s
        return LayerPlan(
            work.layer,
            tuple(cpu),
            tuple(resident + copies),
            tuple(copies),
            cpu_end_s,
            gpu_end_s,
            link_end_s,
            max(cpu_end_s, gpu_end_s),
            "exact",
        )


@lru_cache(maxsize=16)
def decode_table(cost: LayerCost, top_k: int, gpu_free_s: float) -> DecodeTable:
    """Return the plans for layers whose shared expert takes ``gpu_free_s``, made at most once."""
    return DecodeTable(cost, top_k, gpu_free_s=gpu_free_s, search_s=SEARCH_S)
