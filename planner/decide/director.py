"""The one place that decides, layer by layer, what runs where and what the link copies when.

The runtime and the simulator call the same director with the same events: the router's choice
(``place``), the time left on the link (``fill``), a copy that failed (``lost``), a generation
that was broken off (``abandon``). It knows ids and predicted times only; who carries its
decisions out, on real or simulated lanes, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from numpy.typing import ArrayLike

from planner.cost.cost import CostModel
from planner.cost.step_times import contended_s
from planner.decide.cache import ExpertCache
from planner.decide.decode_table import decode_table
from planner.decide.layer_plan import LayerPlan
from planner.decide.policy import Ids, Values
from planner.decide.prefetch import LASTING, Ahead, NoPrefetch, Prefetch, ValuePrefetch
from planner.decide.problem import LayerCost
from planner.decide.schedule import schedule
from planner.describe.estimate import LayerWork
from planner.errors import CapacityError

Scheduler = Callable[[LayerWork, Collection[int], LayerCost], LayerPlan]


SMOOTHING = 0.75
"""Weight of the past in a layer's usual idle link time."""


REALISED = 1 / 5
"""Part of the most that copies ahead could save that they do save: measured with ``hybrid bench
hybrid``'s cases, where the experts' time fell by 3 to 56 us a layer of at most 245."""
REUSE = 0.6
"""How much likelier the next token uses what this one used than whom that evicts: fitted to
simulated runs on recorded traces."""


DECIDING_S = 80e-6
"""What looking one layer ahead, choosing prefetches and handing them out takes the host in a layer
of decode: median of the same cases on a 3 GHz Zen 3, which lie between 0 and 118 us. The CPU's
experts start that much later."""


FURTHER_S = 20e-6
"""What looking and choosing for one more layer ahead takes, measured alone."""
FURTHER_GAIN = 0.007
"""Share of a layer's time that one more layer ahead saves: mean of simulated runs, see
``hybrid bench planner``."""


class Admission(NamedTuple):
    """An expert that got a slot, and whom it evicted; None when a slot was free."""

    layer: int
    expert: int
    evicted: int | None


class Decision(NamedTuple):
    """What to do in one layer's step.

    Parameters
    ----------
    work
        What was asked.
    plan
        Where every activated expert runs.
    residency
        Activated experts that were in the layer's slots when the plan was made.
    admitted
        Those of ``plan.copies`` that are kept, in the order of the copies; the others are used
        once and dropped.
    """

    work: LayerWork
    plan: LayerPlan
    residency: frozenset[int]
    admitted: tuple[Admission, ...]

    @property
    def hits(self) -> int:
        """How many activated experts were resident."""
        return len(self.residency)


class Fill(NamedTuple):
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
    deciding_s
        What looking ahead costs in a layer of decode; it is only done where it can save more.
    """

    def __init__(
        self,
        cost: CostModel,
        cache: ExpertCache,
        *,
        scheduler: Scheduler = schedule,
        prefetch: bool = True,
        refill: bool = True,
        deciding_s: float = DECIDING_S,
    ) -> None:
        self.cost = cost
        self.cache = cache
        self.refill, self._prefetch = refill, prefetch
        self.refilled = 0
        """Experts that the CPU computed and idle link time brought to the cache after."""
        self._scheduler = scheduler
        self._top_k = cost.model.experts.top_k
        link = cost.hardware.link
        self._slowdown = link.cpu_slowdown.value if link else 1.0
        self._copy_s = cost.experts.copy_s()
        self._spare_s: dict[tuple[int, int], float] = {}
        # What the shared expert takes in decode: the time most steps find the GPU free.
        self._shared_s = next(cost.ffn(layer, 1).value for layer in cost.model.layers if layer.moe)
        self._table = decode_table(cost.experts, cost.model.experts.top_k, self._shared_s)
        by_hits = self._table.by_hits()
        # What one more hit saves in decode at 0, 1, ... hits; a prompt has more: the mean.
        self._hit_s = [fewer - more for fewer, more in pairwise(by_hits)]
        self._hit_s += [0.0, (by_hits[0] - by_hits[-1]) / self._top_k]
        # The most that copies ahead can save in a layer: as many as the link carries from layer
        # to layer, each a hit more where that is worth most.
        first = next(layer for layer in cost.model.layers if layer.moe)
        period_s = by_hits[self._top_k // 2] + cost.mixer(first, 1, 1).value
        self.most_saved_s = max(self._hit_s) * min(self._top_k, period_s / self._copy_s)
        self.deciding_s = deciding_s
        self.reach = 3 if FURTHER_GAIN * period_s > FURTHER_S or not deciding_s else 1
        """How many layers decode looks ahead."""
        self.prefetcher = (
            ValuePrefetch(by_hits, self._copy_s, cost.experts.bytes)
            if prefetch
            else NoPrefetch(cost.experts.bytes)
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether prefetching in decode saves more than deciding it takes."""
        return self._prefetch and self.most_saved_s * REALISED > self.deciding_s

    def place(
        self,
        layer: int,
        loads: tuple[tuple[int, int], ...],
        ids: Ids | Sequence[int],
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
        tokens = -(-sum([load for _, load in loads]) // self._top_k)
        found = cache.step(layer, ids, weights, tokens)
        for expert in self.prefetcher.resolve(layer, found.hits, len(found.misses)):
            cache.unpin(layer, expert)
        residency = frozenset(found.hits)
        if self._scheduler is schedule:
            plan = self._table.plan(work, *found)
        else:
            plan = self._scheduler(work, residency, self.cost.experts)
        return Decision(work, plan, residency, tuple(self._admit(layer, plan.copies)))

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
            The next layers in the order they run; may be empty. Each with what a predictor
            expects of its experts, ``[E]``: after a step of one token the probability of being
            activated, after a longer one the tokens each will get.
        idle_s
            Idle link time from the end of the plan's copies until the next layer's experts start;
            further entries, ascending, until those of the layers after it. The director
            estimates what is missing, from the idle time those layers had in their last steps.
        """
        routed = sum([load for _, load in decision.work.loads])
        prompt = routed > self._top_k
        layers: list[Ahead] = []
        if self.looks_ahead or (prompt and self._prefetch):
            ahead = ahead if prompt else ahead[: self.reach]
            layers = self._ahead(decision, routed.bit_length(), ahead, idle_s)
        room = max(0, int(idle_s[0] / self._copy_s)) if self.refill else 0
        if not (layers or room):
            return ()
        price_s = self._price_s(decision, 1 + max(room, len(layers) and self._starts(idle_s[0])))
        fetches: Sequence[Prefetch] = ()
        if layers and prompt:
            cpu_s = self.cost.experts.cpu_s
            fetches = self.prefetcher.choose_for_prompt(layers[0], self.cache, cpu_s, price_s)
        elif layers:
            fetches = self.prefetcher.choose(layers, self.cache, price_s)
        fills = []
        for fetch in fetches:
            evicted = self.cache.admit(fetch.layer, fetch.expert, fetch.evicting)
            self.cache.pin(fetch.layer, fetch.expert)
            fills.append(Fill(Admission(fetch.layer, fetch.expert, evicted), "prefetch"))
        room = self._refills(decision, len(fills), room, price_s)
        if room:
            refills = self._refill(decision, room)
            self.refilled += len(refills)
            fills += [Fill(admission, "refill") for admission in refills]
        return tuple(fills)

    def _refills(self, decision: Decision, done: int, room: int, price_s: Sequence[float]) -> int:
        """Return how many more copies are worth it for the tokens to come, after ``done``."""
        hit_s = self._hit_s[min(decision.hits, len(self._hit_s) - 1)]
        worth_s = LASTING * REUSE * hit_s
        more = done
        while more < room and price_s[more + 1] - price_s[more] <= worth_s:
            more += 1
        return more - done

    def _refill(self, decision: Decision, room: int) -> list[Admission]:
        """Bring in what the CPU computes in this layer, as far as the cache values it more."""
        plan = decision.plan
        value = self.cache.value(plan.layer).tolist()
        missing = [expert for expert in plan.cpu if expert not in decision.residency]
        missing.sort(key=value.__getitem__, reverse=True)
        return self._admit(plan.layer, missing[:room])

    def _starts(self, idle_s: float) -> int:
        """How many copies start before the next layer's experts do, the last half way in."""
        return max(0, round(idle_s / self._copy_s))

    def _ahead(
        self,
        decision: Decision,
        size: int,
        ahead: Sequence[tuple[int, Values]],
        known_s: Sequence[float],
    ) -> list[Ahead]:
        """Return the next layers with the idle time before each; remember what this one leaves.

        A copy for a later layer is decided before the last moment only where the idle time
        between is short: predictions get better. And only copies that start before the next layer
        are decided at all. Steps of very different ``size`` leave very different times, so those
        are kept apart.
        """
        here, spare_s = (size, decision.plan.layer), max(0.0, known_s[0])
        usual_s = self._spare_s.get(here, spare_s)
        self._spare_s[here] = spare_s + SMOOTHING * (usual_s - spare_s)
        until_s, limit_s = 0.0, self._starts(spare_s) * self._copy_s
        found: list[Ahead] = []
        for distance, (layer, expected) in enumerate(ahead):
            if distance < len(known_s):
                until_s = known_s[distance]
            else:
                until_s += self._spare_s.get((size, ahead[distance - 1][0]), spare_s)
            if distance == 0:
                found.append(Ahead(layer, expected, until_s))
            elif until_s - spare_s < self._top_k * self._copy_s:
                found.append(Ahead(layer, expected, max(spare_s, min(until_s, limit_s))))
        return found

    def _price_s(self, decision: Decision, most: int) -> list[float]:
        """Return how much later the layer ends for 0, 1, ... ``most`` copies after the plan's."""
        plan, slowdown = decision.plan, self._slowdown
        busy_s = max(plan.link_end_s, decision.work.link_free_s)
        ends_s = [
            max(plan.gpu_end_s, contended_s(plan.cpu_end_s, busy_s + n * self._copy_s, slowdown))
            for n in range(most + 1)
        ]
        return [end_s - ends_s[0] for end_s in ends_s]

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

    def _admit(self, layer: int, experts: Iterable[int]) -> list[Admission]:
        """Keep what is worth more than what it replaces; return what was kept."""
        kept = self.cache.offer_each(layer, experts)
        return [Admission(layer, expert, evicted) for expert, evicted in kept]
