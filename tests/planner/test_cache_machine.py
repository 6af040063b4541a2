"""The expert cache as a state machine, beside a plain model of what it must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from planner.decide.cache import ExpertCache
from planner.decide.forecast import Forecast
from planner.decide.oracles import Belady
from planner.decide.policies import ARC, LFU, LRU, MRS, Blend, StaticPopularity
from planner.decide.replay import replay
from planner.errors import CapacityError

LAYERS, EXPERTS = 2, 7

layers = st.integers(0, LAYERS - 1)
experts = st.integers(0, EXPERTS - 1)


class CacheMachine(RuleBasedStateMachine):
    """Steps, admissions and pins in any order, for any policy."""

    @initialize(
        name=st.sampled_from(["lru", "lfu", "mrs", "blend", "arc", "static", "forecast"]),
        capacities=st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS),
    )
    def start(self, name, capacities):
        self.cache = ExpertCache(
            {
                "lru": lambda: LRU(LAYERS, EXPERTS),
                "lfu": lambda: LFU(LAYERS, EXPERTS),
                "mrs": lambda: MRS(LAYERS, EXPERTS),
                "blend": lambda: Blend(LAYERS, EXPERTS),
                "arc": lambda: ARC(LAYERS, EXPERTS, capacities),
                "static": lambda: StaticPopularity(LAYERS, EXPERTS, np.eye(LAYERS, EXPERTS)),
                "forecast": lambda: Forecast(LAYERS, EXPERTS),
            }[name](),
            capacities,
        )
        self.held: list[set[int]] = [set() for _ in range(LAYERS)]
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
        held.add(expert)

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
        """Residency, capacity and pins agree after every rule."""
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
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
