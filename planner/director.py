"""The one place that decides, layer by layer, what runs where and what the link copies when.

The runtime and the simulator call the same director with the same events: the router's choice
(``place``), the time left on the link (``fill``), a copy that failed (``lost``), a generation
that was broken off (``abandon``). It knows ids and predicted times only; who carries its
decisions out, on real or simulated lanes, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from numpy.typing import ArrayLike

from planner.cache import ExpertCache, Values
from planner.cost import CostModel
from planner.errors import CapacityError
from planner.plan import LayerPlan
from planner.prefetch import Ahead, NoPrefetch, ValuePrefetch
from planner.problem import LayerCost
from planner.schedule import schedule
from planner.spec import LayerWork

Scheduler = Callable[[LayerWork, Collection[int], LayerCost], LayerPlan]


@dataclass(frozen=True, slots=True)
class Admission:
    """An expert that got a slot, and whom it evicted; None when a slot was free."""

    layer: int
    expert: int
    evicted: int | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in one layer's step.

    Parameters
    ----------
    work
        What was asked.
    plan
        Where every activated expert runs.
    residency
        Experts in the layer's slots when the plan was made.
    hits
        Activated experts among them.
    admitted
        Those of ``plan.copies`` that are kept, in the order of the copies; the others are used
        once and dropped.
    """

    work: LayerWork
    plan: LayerPlan
    residency: frozenset[int]
    hits: int
    admitted: tuple[Admission, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """A copy for idle link time: ahead of its router (``prefetch``), or after it (``refill``)."""

    admission: Admission
    reason: Literal["prefetch", "refill"]


class Director:
    """Decides for a model on a machine with a GPU; not for use by two threads at once.

    Parameters
    ----------
    cost
        Durations of the model's experts on the machine.
    cache
        Residency of every layer and the policy that changes it. Only the director may change it
        while it is in charge.
    scheduler
        Ours, or a baseline.
    prefetch
        Whether idle link time copies experts that the next layers will likely use.
    refill
        Whether what is left of it copies experts that the CPU computed and the cache values
        above whom it evicts.
    """

    def __init__(
        self,
        cost: CostModel,
        cache: ExpertCache,
        *,
        scheduler: Scheduler = schedule,
        prefetch: bool = True,
        refill: bool = True,
    ) -> None:
        self.cost = cost
        self.cache = cache
        self.refill = refill
        self.refilled = 0
        """Experts that the CPU computed and idle link time brought to the cache after."""
        self._scheduler = scheduler
        self._copy_s = cost.experts.copy_s()
        # What the shared expert takes in decode: the time most steps find the GPU free.
        self._shared_s = next(cost.ffn(layer, 1).value for layer in cost.model.layers if layer.moe)
        self._table = cost.decode_table(self._shared_s)
        self.prefetcher = (
            ValuePrefetch(self._table.by_hits(), self._copy_s, cost.experts.bytes)
            if prefetch
            else NoPrefetch(cost.experts.bytes)
        )

    def place(
        self,
        layer: int,
        loads: tuple[tuple[int, int], ...],
        ids: ArrayLike,
        weights: ArrayLike,
        *,
        gpu_free_s: float,
        link_free_s: float,
    ) -> Decision:
        """Take what the router of ``layer`` chose and decide where each expert runs.

        Copies that the plan asks for and that are kept have their slots from now on.

        Parameters
        ----------
        layer
            Index among the model's MoE layers.
        loads
            ``(expert id, tokens)`` pairs, ids ascending, each expert that got a token once.
        ids, weights
            The same experts, and the mean routing weight of each over all tokens of the step: one
            row of ``Policy.observe``.
        gpu_free_s, link_free_s
            When those lanes are free, in seconds from now.

        Raises
        ------
        WorkError
            When the loads are not as described or a time is negative.
        """
        cache = self.cache
        work = LayerWork(layer, loads, gpu_free_s, link_free_s)
        residency = cache.residency(layer)
        hits = len(cache.step(layer, ids, weights).hits)
        for expert in self.prefetcher.resolve(layer, work.expert_ids):
            cache.unpin(layer, expert)
        plan = self._plan(work, residency)
        return Decision(work, plan, residency, hits, tuple(self._admit(layer, plan.copies)))

    def fill(
        self,
        decision: Decision,
        ahead: Sequence[tuple[int, Values]],
        idle_s: Sequence[float],
    ) -> tuple[Fill, ...]:
        """Decide what the link copies after the plan's copies; every copy has its slot at once.

        First what the next layers will likely use, by the prefetch rule; those are pinned until
        their router has answered. Then what the CPU computes in this layer, where the cache
        values it above whom it evicts.

        Parameters
        ----------
        decision
            What ``place`` said.
        ahead
            The next layers in the order they run, each with the probability of every expert
            being activated there, ``[E]``, from any predictor; may be empty.
        idle_s
            Idle link time, from the end of the plan's copies until the experts of each layer of
            ``ahead`` start, ascending. One more than none: without ``ahead``, until the next
            layer.
        """
        room = int(idle_s[0] / self._copy_s)
        if room <= 0:
            return ()
        fills = []
        layers = [Ahead(layer, p, s) for (layer, p), s in zip(ahead, idle_s, strict=False)]
        for fetch in self.prefetcher.choose(layers, self.cache):
            evicted = self.cache.admit(fetch.layer, fetch.expert)
            self.cache.pin(fetch.layer, fetch.expert)
            fills.append(Fill(Admission(fetch.layer, fetch.expert, evicted), "prefetch"))
        if self.refill and len(fills) < room:
            layer = decision.plan.layer
            value = self.cache.value(layer)
            missing = [expert for expert in decision.plan.cpu if expert not in decision.residency]
            missing.sort(key=lambda expert: -value[expert])
            refills = self._admit(layer, missing[: room - len(fills)])
            self.refilled += len(refills)
            fills += [Fill(admission, "refill") for admission in refills]
        return tuple(fills)

    def lost(self, layer: int, expert: int) -> None:
        """Learn that the copy of an admitted expert failed: it is not resident after all."""
        if self.prefetcher.forget(layer, expert):
            self.cache.unpin(layer, expert)
        self.cache.drop(layer, expert)

    def abandon(self) -> None:
        """End whatever was going on: nothing is pinned or in use any more.

        Copies that will never land are told by ``lost``, before or after.
        """
        for layer, expert in self.prefetcher.abandon():
            self.cache.unpin(layer, expert)
        self.cache.release()

    def check_integrity(self) -> None:
        """Raise if the cache contradicts itself, or an unresolved prefetch has no pinned slot.

        Raises
        ------
        CapacityError
            Naming the layer.
        """
        self.cache.check_integrity()
        loose = [at for at in self.prefetcher.unresolved() if not self.cache.pinned(*at)]
        if loose:
            raise CapacityError(
                f"prefetched experts without a pinned slot, as (layer, expert): {loose}",
                hint="this is a defect of the director: please report it",
            )

    def _plan(self, work: LayerWork, residency: frozenset[int]) -> LayerPlan:
        """Ask the scheduler; steps of equal loads are looked up in decode's table."""
        if self._scheduler is not schedule or len({load for _, load in work.loads}) != 1:
            return self._scheduler(work, residency, self.cost.experts)
        return self._table.plan(work, residency)

    def _admit(self, layer: int, experts: Iterable[int]) -> list[Admission]:
        """Keep what is worth more than what it replaces; return what was kept."""
        kept = []
        for expert in experts:
            worth, evicted = self.cache.offer(layer, expert)
            if worth:
                kept.append(Admission(layer, expert, evicted))
        return kept
