"""The expert cache as a state machine, beside a plain model of what it must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from planner.decide import policies
from planner.decide.cache import ExpertCache
from planner.decide.oracles import Belady
from planner.decide.policies.lru import LRU
from planner.decide.replay import replay
from planner.errors import CapacityError

LAYERS, EXPERTS = 2, 7

layers = st.integers(0, LAYERS - 1)
experts = st.integers(0, EXPERTS - 1)


class CacheMachine(RuleBasedStateMachine):
    """Steps, admissions, landings and pins in any order, for any policy."""

    @initialize(
        name=st.sampled_from(policies.names()),
        capacities=st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS),
    )
    def start(self, name, capacities):
        self.cache = ExpertCache(policies.policy(name, LAYERS, EXPERTS), capacities)
        self.held: list[set[int]] = [set() for _ in range(LAYERS)]
        self.free = list(range(sum(capacities)))
        self.slots: dict[tuple[int, int], int] = {}
        self.flying: set[tuple[int, int]] = set()
        self.pins: list[list[int]] = [[] for _ in range(LAYERS)]
        self.in_use: dict[int, set[int]] = {}
        self.steps: list[list[list[int]]] = [[] for _ in range(LAYERS)]
        self.hits = [0] * LAYERS
        self.only_demand = True

    @rule(layer=layers, chosen=st.sets(experts, min_size=2, max_size=2))
    def step(self, layer, chosen):
        """Hits and misses are what the model holds and does not hold."""
        found = self.cache.step(layer, sorted(chosen), [0.25, 0.5])
        assert set(found.hits) == chosen & self.held[layer]
        assert set(found.misses) == chosen - self.held[layer]
        self.in_use = {layer: set(chosen)}
        self.steps[layer].append(sorted(chosen))
        self.hits[layer] += len(found.hits)

    @rule()
    def release(self):
        """After a step its experts are as evictable as any."""
        self.cache.release()
        self.in_use = {}

    @rule(layer=layers, expert=experts)
    def admit(self, layer, expert):
        """Evicts only what may go, only when full, and nothing when it refuses."""
        held = self.held[layer]
        protected = set(self.pins[layer]) | self.in_use.get(layer, set())
        full = len(held) >= self.cache.capacities[layer]
        impossible = expert in held or (full and held <= protected)
        assert self.cache.has_room(layer) == (not full or not held <= protected)
        if impossible:
            with pytest.raises(CapacityError, match=f"expert {expert}"):
                self.cache.admit(layer, expert)
            return
        if not self.steps[layer] or expert not in self.steps[layer][-1]:
            self.only_demand = False
        expected = self.cache.victim(layer, expert) if full else None
        evicted = self.cache.admit(layer, expert)
        assert evicted == expected
        if full:
            assert evicted in held - protected
            held.remove(evicted)
            self.gone(layer, evicted)
        held.add(expert)
        self.slots[layer, expert] = self.free.pop(0)
        self.flying.add((layer, expert))

    def gone(self, layer, expert):
        """A slot that became free is the last to be given out again."""
        self.free.append(self.slots.pop((layer, expert)))
        self.flying.discard((layer, expert))

    @rule(layer=layers, expert=experts)
    def drop(self, layer, expert):
        """Only residents without a pin; their slot is free then."""
        if expert not in self.held[layer] or expert in self.pins[layer]:
            with pytest.raises(CapacityError, match="cannot drop"):
                self.cache.drop(layer, expert)
            return
        self.cache.drop(layer, expert)
        self.held[layer].remove(expert)
        self.gone(layer, expert)

    @rule(layer=layers, expert=experts)
    def land(self, layer, expert):
        """A copy lands once, and only where one was on its way."""
        if (layer, expert) not in self.flying:
            with pytest.raises(CapacityError, match="is on its way"):
                self.cache.landed(layer, expert)
            return
        self.cache.landed(layer, expert)
        self.flying.remove((layer, expert))

    @rule(layer=layers, expert=experts)
    def worth_admitting(self, layer, expert):
        """Asking changes nothing; a free slot is always worth filling."""
        before = self.cache.residency(layer)
        worth = self.cache.worth_admitting(layer, expert)
        assert self.cache.residency(layer) == before
        if len(before) < self.cache.capacities[layer]:
            assert worth

    @rule(layer=layers, expert=experts)
    def pin(self, layer, expert):
        """Only residents can be pinned, any number of times."""
        if expert not in self.held[layer]:
            with pytest.raises(CapacityError, match="not resident"):
                self.cache.pin(layer, expert)
            return
        self.cache.pin(layer, expert)
        self.pins[layer].append(expert)

    @rule(layer=layers, expert=experts)
    def unpin(self, layer, expert):
        """One unpin takes back one pin, and no more than there are."""
        if expert not in self.pins[layer]:
            with pytest.raises(CapacityError, match="not pinned"):
                self.cache.unpin(layer, expert)
            return
        self.cache.unpin(layer, expert)
        self.pins[layer].remove(expert)

    @invariant()
    def holds_what_the_model_holds(self):
        """Residency, slots, copies on their way, capacity and pins agree after every rule."""
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.in_flight() == sorted(self.flying)
        assert self.slots == {
            (layer, expert): slot
            for layer in range(LAYERS)
            for expert, slot in self.cache.slots(layer).items()
        }
        for layer in range(LAYERS):
            held = self.cache.residency(layer)
            assert held == self.held[layer]
            assert len(held) <= self.cache.capacities[layer]
            assert set(self.pins[layer]) <= held

    @precondition(lambda self: self.only_demand)
    @invariant()
    def never_above_belady(self):
        """While every admission was of an expert in use, Belady would have had no fewer hits."""
        if not hasattr(self, "cache"):
            return
        for layer, steps in enumerate(self.steps):
            if steps:
                ids = np.array(steps)[:, None]
                best = replay(
                    Belady(ids, EXPERTS),
                    ids,
                    np.ones(ids.shape),
                    [self.cache.capacities[layer]],
                    "worth",
                )
                assert self.hits[layer] <= best.hits[0]


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_slots_are_reused_in_the_order_in_which_they_became_free():
    """The slot that was free for longest comes first: the device is done with it."""
    cache = ExpertCache(LRU(2, EXPERTS), [3, 3])
    for expert in range(3):
        cache.admit(0, expert)
    for expert in (1, 2, 0):
        cache.drop(0, expert)
    for expert in range(3):
        cache.admit(1, expert)
        cache.admit(0, expert)
    assert cache.slots(1) == {0: 3, 1: 5, 2: 2}
    assert cache.slots(0) == {0: 4, 1: 1, 2: 0}


def test_integrity_is_really_checked():
    """A slot that is lost, or held twice, and a copy for nobody are found."""
    lost, twice, nobody = (ExpertCache(LRU(1, EXPERTS), [2]) for _ in range(3))
    lost._free.popleft()
    with pytest.raises(AssertionError, match="twice or lost"):
        lost.check_integrity()
    twice.admit(0, 0)
    twice._free.append(0)
    with pytest.raises(AssertionError, match="twice or lost"):
        twice.check_integrity()
    nobody._in_flight[0].add(5)
    with pytest.raises(AssertionError, match="5"):
        nobody.check_integrity()
