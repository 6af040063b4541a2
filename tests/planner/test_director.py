"""The director: what it admits has a slot, what it pins it gives back, whatever happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planner.cost.cost import CostModel
from planner.decide.cache import ExpertCache
from planner.decide.director import Director
from planner.decide.policies.blend import Blend
from planner.decide.policies.lru import LRU
from planner.decide.prefetch import ValuePrefetch
from planner.decide.schedule import schedule
from planner.errors import CapacityError
from planner.foretell.memory import Fit
from planner.foretell.routing import synthetic
from planner.foretell.simulate import Simulator
from planner_examples import machine, machine_table, quantity, small_model

MODEL = small_model()
LAYERS, EXPERTS, TOP_K = 6, 16, 4
SLOW_CPU = {**machine_table()["cpu"], "memory_bytes_per_s": quantity(0.5e9)}
CONTENDED = {**machine_table()["link"], "cpu_slowdown": quantity(1.5)}


def director(slots: int = 3, slow: bool = True, **options: Any) -> Director:
    """The small model where copies beat the CPU (or do not), with empty slots; deciding is free."""
    hardware = machine(cpu=SLOW_CPU) if slow else machine()
    cost = CostModel(MODEL, hardware, "q4_0")
    options.setdefault("deciding_s", 0.0)
    return Director(cost, ExpertCache(Blend(LAYERS, EXPERTS), [slots] * LAYERS), **options)


def place(one: Director, layer: int, ids: list[int], tokens: int = 1, link_free_s: float = 0.0):
    """Route ``tokens`` tokens to each of ``ids``."""
    loads = tuple((expert, tokens) for expert in sorted(ids))
    weights = np.full(len(ids), 1 / len(ids))
    return one.place(layer, loads, sorted(ids), weights, gpu_free_s=0.0, link_free_s=link_free_s)


def sure(*ids: int) -> np.ndarray:
    """A predictor that is sure of ``ids``."""
    expected = np.zeros(EXPERTS)
    expected[list(ids)] = 1.0
    return expected


def test_place_plans_as_the_scheduler_does():
    """The table's answer and the plan of unequal loads are ``schedule``'s, link busy or not."""
    one = director()
    for tokens, link_free_s in ((1, 0.0), (1, 2e-4), (7, 0.0)):
        decision = place(one, 2, [1, 5, 6, 9], tokens, link_free_s)
        decision.plan.validate(decision.work, decision.residency)
        best = schedule(decision.work, decision.residency, one.cost.experts)
        assert decision.plan.makespan_s == pytest.approx(best.makespan_s)
        assert decision.hits == len(decision.residency & {1, 5, 6, 9})


def test_kept_copies_have_slots_and_others_do_not():
    """With two slots and more copies than that, what is admitted is resident, the rest staged."""
    decision = place(one := director(slots=2), 0, [0, 1, 2, 3])
    assert len(decision.plan.copies) > 2
    kept = {admission.expert for admission in decision.admitted}
    assert kept == one.cache.residency(0)
    assert kept < set(decision.plan.copies)


def test_prefetch_pins_until_the_router_answers():
    """A fetched expert cannot be evicted before its layer ran, and can afterwards."""
    one = director()
    fills = one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7, 8))], [1.0])
    fetched = [fill.admission.expert for fill in fills if fill.reason == "prefetch"]
    assert fetched == [7, 8]
    assert all(one.cache.pinned(1, expert) for expert in fetched)
    place(one, 1, [4, 5, 6, 7])
    assert not any(one.cache.pinned(1, expert) for expert in fetched)
    assert (one.prefetcher.used, one.prefetcher.wasted) == (1, 1)
    # The first layer missed all four, the second three: one miss of eight was avoided.
    assert one.prefetcher.prefetch_coverage == pytest.approx(1 / 8)


def test_without_idle_time_nothing_is_copied():
    """A link that is busy until the next layer starts gets nothing more to do."""
    one = director(slots=EXPERTS)
    for idle_s in (0.0, -1.0, 0.4 * one.cost.experts.copy_s()):
        decision = place(one, 0, [0, 1, 2, 3])
        assert one.fill(decision, [(1, sure(7, 8))], [idle_s]) == ()


def test_switches_are_obeyed():
    """Neither prefetch nor refill happens when it is off."""
    one = director(slots=EXPERTS, slow=False, prefetch=False, refill=True)
    reasons = {f.reason for f in one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7))], [1.0])}
    assert reasons <= {"refill"}
    one = director(slots=EXPERTS, refill=False)
    reasons = {f.reason for f in one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7))], [1.0])}
    assert reasons == {"prefetch"}


def test_a_prompt_fetches_the_heaviest_for_the_next_layer():
    """In prefill the experts with the most expected tokens come first, onto the least loaded."""
    one = director(slots=2)
    for expert in (0, 1):
        one.cache.admit(1, expert)
    loads = np.zeros(EXPERTS)
    loads[[0, 1, 2, 3]] = (900, 1, 800, 2)
    decision = place(one, 0, list(range(EXPERTS)), tokens=50)
    fills = [f for f in one.fill(decision, [(1, loads)], [1.0]) if f.reason == "prefetch"]
    assert [(f.admission.expert, f.admission.evicted) for f in fills] == [(2, 1)]


def test_later_layers_wait_where_there_is_time_later():
    """Idle time for a whole layer's experts in between: the copy is decided there, not here."""
    one = director()
    decision = place(one, 0, [0, 1, 2, 3])
    copy_s = one.cost.experts.copy_s()
    far = [(1, sure()), (2, sure(7))]
    assert one.fill(decision, far, [2 * copy_s, 2 * copy_s + TOP_K * copy_s]) == ()
    (fill,) = one.fill(decision, far, [2 * copy_s, 4 * copy_s])
    assert (fill.admission.layer, fill.admission.expert) == (2, 7)


def test_idle_time_of_later_layers_is_what_they_had():
    """Known idle time is taken, missing is estimated: a layer that never idles adds nothing."""
    one = director(slots=EXPERTS, refill=False)
    copy_s = one.cost.experts.copy_s()
    for _ in range(20):
        one.fill(place(one, 1, [0, 1, 2, 3]), [], [0.0])
    # One copy fits now, none during layer 1: the second layer's copy would not be there in time.
    decision = place(one, 0, [0, 1, 2, 3])
    fills = one.fill(decision, [(1, sure(4, 5)), (2, sure(6, 7))], [1.2 * copy_s])
    assert len(fills) == 1


def test_copies_that_slow_the_cpu_down_must_be_worth_it():
    """An unlikely expert is fetched for free, and not where the CPU pays for it."""
    unlikely = np.full(EXPERTS, 0.0)
    unlikely[7] = 0.2
    chosen = []
    for link in (machine_table()["link"], CONTENDED):
        cost = CostModel(MODEL, machine(link=link), "q4_0")
        one = Director(
            cost, ExpertCache(Blend(LAYERS, EXPERTS), [3] * LAYERS), refill=False, deciding_s=0.0
        )
        decision = place(one, 0, list(range(TOP_K)))
        chosen.append(one.fill(decision, [(1, unlikely)], [1.1 * cost.experts.copy_s()]))
    assert [len(fills) for fills in chosen] == [1, 0]


def test_a_lost_copy_is_not_resident():
    """What failed to arrive loses slot and pin; it cannot be lost twice."""
    one = director()
    fills = one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7))], [1.0])
    assert (fills[0].admission.layer, fills[0].admission.expert) == (1, 7)
    one.lost(1, 7)
    assert 7 not in one.cache.residency(1)
    one.check_integrity()
    with pytest.raises(CapacityError, match="expert 7, it is not resident"):
        one.lost(1, 7)


def test_integrity_names_a_prefetch_without_its_pin():
    """Taking the director's pin away is noticed."""
    one = director()
    one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7))], [1.0])
    one.cache.unpin(1, 7)
    with pytest.raises(CapacityError, match=r"\(1, 7\)"):
        one.check_integrity()


class Sessions(RuleBasedStateMachine):
    """Layers, lost copies and broken-off generations in any order, against a plain model."""

    def __init__(self):
        super().__init__()
        self.one = director(slots=3)
        self.held: list[set[int]] = [set() for _ in range(LAYERS)]
        self.flying: list[tuple[int, int]] = []

    def admit(self, admission):
        """Every admission takes a free slot or its victim's, never more than there are."""
        held = self.held[admission.layer]
        assert admission.expert not in held
        if admission.evicted is not None:
            held.remove(admission.evicted)
        held.add(admission.expert)
        assert len(held) <= 3
        self.flying.append((admission.layer, admission.expert))

    @rule(
        layer=st.integers(0, LAYERS - 1),
        ids=st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=TOP_K),
        tokens=st.sampled_from([1, 1, 40]),
        seed=st.integers(0, 99),
        idle_s=st.sampled_from([0.0, 0.001, 0.004, 1.0]),
    )
    def step(self, layer, ids, tokens, seed, idle_s):
        """A layer's step: plan, kept copies, then fills."""
        decision = place(self.one, layer, sorted(ids), tokens)
        assert decision.residency == self.held[layer] & ids
        decision.plan.validate(decision.work, decision.residency)
        for admission in decision.admitted:
            assert admission.expert in decision.plan.copies
            self.admit(admission)
        rng = np.random.default_rng(seed)
        later = range(layer + 1, min(LAYERS, layer + 4))
        ahead = [(m, rng.random(EXPERTS) * tokens) for m in later]
        for fill in self.one.fill(decision, ahead, [idle_s]):
            assert fill.reason == "prefetch" or fill.admission.expert in decision.plan.cpu
            self.admit(fill.admission)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose(self, data):
        """A copy that is still wanted fails."""
        layer, expert = data.draw(st.sampled_from(self.flying))
        if expert in self.held[layer]:
            self.one.lost(layer, expert)
            self.held[layer].remove(expert)

    @rule()
    def abandon(self):
        """Afterwards nothing is pinned anywhere, and nothing else has changed."""
        self.one.abandon()
        self.flying.clear()
        for layer, held in enumerate(self.held):
            assert self.one.cache.evictable(layer) == sorted(held)

    @invariant()
    def agrees(self):
        """The cache holds what was admitted, and only unresolved prefetches are pinned."""
        self.one.check_integrity()
        waiting = set(self.one.prefetcher.unresolved())
        for layer, held in enumerate(self.held):
            assert self.one.cache.residency(layer) == held
            for expert in held:
                assert self.one.cache.pinned(layer, expert) == ((layer, expert) in waiting)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@given(st.integers(0, 2**16), st.sampled_from([1, 3, 9]), st.booleans())
@settings(max_examples=10, deadline=None)
def test_the_simulator_does_what_the_director_says(seed, slots, slow):
    """Replaying a run's events to a second director gives the same decisions, one by one."""
    routing = synthetic(MODEL, 8, 6, seed=seed)
    made, twin = (director(slots, slow) for _ in range(2))
    simulator = Simulator(made.cost, Fit((), 0, 0, (slots,) * LAYERS, 1.0), routing, made.cache)
    simulator.director = _Mirror(made, twin)
    run = simulator.simulate(8)
    fills = simulator.director.fills
    made.check_integrity()
    assert run.hit_rate == sum(simulator.director.hits[LAYERS:]) / (6 * LAYERS * TOP_K)
    assert run.prefetched + run.refilled == sum(fills[LAYERS:])
    assert run.plans == simulator.director.plans[-LAYERS:]


class _Mirror:
    """Passes events on to two directors and insists that they agree."""

    def __init__(self, made: Director, twin: Director) -> None:
        self.made, self.twin, self.prefetcher = made, twin, made.prefetcher
        self.hits, self.fills, self.plans = [], [], []

    def place(self, *args, **times):
        decision = self.made.place(*args, **times)
        assert decision == self.twin.place(*args, **times)
        self.hits.append(decision.hits)
        self.plans.append(decision.plan)
        return decision

    def fill(self, *args):
        fills = self.made.fill(*args)
        assert fills == self.twin.fill(*args)
        self.fills.append(len(fills))
        return fills


def test_any_policy_and_no_prefetch_will_do():
    """Baselines run through the same director: LRU, no prefetch, no refill."""
    cost = CostModel(MODEL, machine(), "q4_0")
    cache = ExpertCache(LRU(LAYERS, EXPERTS), [2] * LAYERS)
    one = Director(cost, cache, prefetch=False, refill=False)
    assert not isinstance(one.prefetcher, ValuePrefetch)
    assert one.fill(place(one, 0, [0, 1, 2, 3]), [(1, sure(7))], [1.0]) == ()
    one.abandon()
    one.check_integrity()


def test_looking_ahead_must_save_more_than_it_takes() -> None:
    """Where copies ahead can save less than the deciding, decode does without; prompts do not."""
    cost = CostModel(small_model(), machine())
    chance = np.linspace(1.0, 0.1, 16)
    fetched = []
    for deciding_s in (0.0, 1.0):
        cache = ExpertCache(Blend(6, 16), [8] * 6)
        one = Director(cost, cache, refill=False, deciding_s=deciding_s)
        assert one.looks_ahead == (deciding_s == 0.0)
        loads = tuple((expert, 1) for expert in range(4))
        decision = one.place(0, loads, range(4), [0.25] * 4, gpu_free_s=0.0, link_free_s=0.0)
        fetched.append(len(one.fill(decision, [(1, chance)], [1.0])))
    assert fetched[0] > 0 == fetched[1]
