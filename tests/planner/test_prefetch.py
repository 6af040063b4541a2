"""Prefetching: the value rule, its knapsack, its account, and when it gives up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive_planner as naive
from planner.decide.cache import ExpertCache
from planner.decide.decode_table import DecodeTable
from planner.decide.policies.lru import LRU
from planner.decide.prefetch import (
    PAUSE,
    WINDOW,
    Ahead,
    NoPrefetch,
    Prefetch,
    ValuePrefetch,
    _knapsack,
)
from planner.errors import WorkError

# Two activated experts; each hit saves a second.
SAVES_A_SECOND = (3.0, 2.0, 1.0)


def cache_of(capacities: list[int], held: list[list[int]], experts: int = 6) -> ExpertCache:
    """Return an LRU cache that holds these experts, the first of each layer used longest ago."""
    cache = ExpertCache(LRU(len(capacities), experts), capacities)
    for layer, ids in enumerate(held):
        for expert in ids:
            cache.step(layer, [expert], [1.0])
            cache.admit(layer, expert)
    cache.release()
    return cache


def test_fetches_the_likeliest_missing_experts_that_fit():
    """Link time for two copies: the two likeliest missing experts, likeliest first."""
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0, expert_bytes=10)
    cache = cache_of([4], [[0]])
    p = np.array([0.9, 0.1, 0.4, 0.0, 0.6, 0.0])
    assert rule.choose([Ahead(0, p, idle_s=2.5)], cache) == (Prefetch(0, 4), Prefetch(0, 2))
    assert rule.resolve(0, [0, 2]) == {2, 4}
    assert (rule.fetched, rule.used, rule.wasted) == (2, 1, 1)
    assert (rule.useful_bytes, rule.wasted_bytes, rule.prefetch_precision) == (10, 10, 0.5)


def test_does_nothing_when_the_evicted_is_as_likely():
    """A full layer whose victim is needed as much as the newcomer: no copy."""
    cache = cache_of([2], [[0, 1]])
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0)
    assert rule.choose([Ahead(0, np.array([0.5, 0.9, 0.5, 0, 0, 0]), 9.0)], cache) == ()
    better = Ahead(0, np.array([0.4, 0.9, 0.5, 0, 0, 0]), 9.0)
    assert rule.choose([better], cache) == (Prefetch(0, 2),)


def test_does_nothing_when_a_hit_saves_nothing():
    """Where the CPU is never the later lane a hit is worth nothing, however sure."""
    rule = ValuePrefetch((1.0, 1.0, 1.0), copy_s=1.0)
    assert rule.choose([Ahead(0, np.ones(6), 9.0)], cache_of([6], [[]])) == ()


def test_pinned_experts_are_not_given_up():
    """A layer whose slots are all pinned gets nothing."""
    cache = cache_of([1], [[0]])
    cache.pin(0, 0)
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0)
    ahead = [Ahead(0, np.array([0.0, 1, 1, 0, 0, 0]), 9.0)]
    assert rule.choose(ahead, cache) == ()
    cache.unpin(0, 0)
    assert rule.choose(ahead, cache) == (Prefetch(0, 1),)


def test_a_copy_must_end_before_its_layer_starts():
    """The nearer layer has time for one copy; the rest of the link's time serves the next."""
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0)
    cache = cache_of([4, 4], [[], []])
    near = Ahead(0, np.array([0.9, 0.8, 0, 0, 0, 0]), idle_s=1.0)
    far = Ahead(1, np.array([0.7, 0.6, 0, 0, 0, 0]), idle_s=2.0)
    assert rule.choose([near, far], cache) == (Prefetch(0, 0), Prefetch(1, 0))
    surer = Ahead(1, np.array([1.0, 0.95, 0, 0, 0, 0]), idle_s=2.0)
    assert rule.choose([near, surer], cache) == (Prefetch(1, 0), Prefetch(1, 1))
    with pytest.raises(WorkError, match=r"before layers \[1, 0\] falls"):
        rule.choose([far, near], cache)


def test_the_worth_of_hits_is_the_expectation_over_the_binomial():
    """With makespans that only fall at two hits, one sure hit is worth nothing by itself."""
    rule = ValuePrefetch((2.0, 2.0, 0.0), copy_s=1.0)
    expected = rule.expected_s(np.array([0.0, 1.0, 2.0]))
    assert expected == pytest.approx([2.0, 2.0 - 0.25 * 2.0, 0.0])


worths = st.lists(
    st.lists(st.integers(-5, 9), max_size=4).map(lambda rest: [0, *rest]), min_size=1, max_size=3
)


@given(worths, st.lists(st.integers(0, 6), min_size=3, max_size=3))
@settings(deadline=None)
def test_the_knapsack_is_the_best_choice(worth, room):
    """No other number of items per group is worth more under the limits."""
    room = sorted(room)[: len(worth)]
    counts = _knapsack([np.array(values, dtype=float) for values in worth], room)
    assert all(sum(counts[: i + 1]) <= room[i] for i in range(len(counts)))
    found = sum(values[n] for values, n in zip(worth, counts, strict=True))
    assert found == naive.best_prefetch(worth, room)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=2),
    st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=2, max_size=2),
    st.floats(0, 5),
    st.floats(0, 5),
)
@settings(deadline=None)
def test_every_choice_can_be_carried_out(probabilities, held, idle_s, more_s):
    """Chosen experts are missing, fit the link, can all be admitted, and never lower the gain."""
    cache = cache_of([4, 4], [sorted(ids) for ids in held])
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=0.5)
    ahead = [
        Ahead(layer, np.array(p), idle_s + layer * more_s) for layer, p in enumerate(probabilities)
    ]
    chosen = rule.choose(ahead, cache)
    before = [sum(p[e] for e in cache.residency(layer)) for layer, p in enumerate(probabilities)]
    for count, fetch in enumerate(chosen, start=1):
        assert count * 0.5 <= ahead[fetch.layer].idle_s
        cache.admit(fetch.layer, fetch.expert)
        cache.pin(fetch.layer, fetch.expert)
    after = [sum(p[e] for e in cache.residency(layer)) for layer, p in enumerate(probabilities)]
    for layer in range(2):
        assert min(after[layer], 2.0) >= min(before[layer], 2.0) - 1e-12


def test_waste_switches_it_off_for_a_while():
    """After WINDOW fetches, most of them useless, nothing is fetched for PAUSE layer steps."""
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0)
    ahead = [Ahead(0, np.array([0.5, 0, 0, 0, 0, 0]), 1.0)]
    for _ in range(WINDOW):
        assert rule.choose(ahead, cache_of([1], [[]])) == (Prefetch(0, 0),)
        rule.resolve(0, [1, 2])
    assert not rule.active
    for _ in range(PAUSE):
        assert rule.choose(ahead, cache_of([1], [[]])) == ()
        rule.resolve(0, [1, 2])
    assert rule.active
    assert rule.choose(ahead, cache_of([1], [[]])) == (Prefetch(0, 0),)
    assert (rule.fetched, rule.used, rule.wasted) == (WINDOW + 1, 0, WINDOW)


def test_useful_prefetches_keep_it_on():
    """Half useful is not yet waste."""
    rule = ValuePrefetch(SAVES_A_SECOND, copy_s=1.0)
    ahead = [Ahead(0, np.array([0.5, 0, 0, 0, 0, 0]), 1.0)]
    for turn in range(2 * WINDOW):
        rule.choose(ahead, cache_of([1], [[]]))
        rule.resolve(0, [0] if turn % 2 else [1])
    assert rule.active
    assert rule.prefetch_precision == 0.5


def test_none_fetches_nothing():
    """The baseline chooses nothing and has nothing to resolve."""
    rule = NoPrefetch(7)
    assert rule.choose([Ahead(0, np.ones(6), 9.0)], cache_of([6], [[]])) == ()
    assert rule.resolve(0, [1]) == frozenset()
    assert (rule.fetched, rule.useful_bytes, rule.prefetch_precision) == (0, 0, 0.0)


def test_makespans_come_from_the_decode_table():
    """The table's makespans by hits are what the rule takes, and more hits are never slower."""

    class Cost:
        cpu_start_s, gpu_start_s = 0.5, 0.1

        def cpu_s(self, load: int) -> float:
            return float(load)

        def gpu_s(self, load: int) -> float:
            return 0.25

        def copy_s(self) -> float:
            return 2.0

    by_hits = DecodeTable(Cost(), 4).by_hits()
    assert len(by_hits) == 5
    assert by_hits == sorted(by_hits, reverse=True)
    assert ValuePrefetch(by_hits, copy_s=2.0).expected_s(np.array([4.0])) == by_hits[4]


def test_bad_input_is_refused():
    """No makespans or a copy time of zero leave nothing to decide by."""
    with pytest.raises(WorkError, match="got 1 makespans"):
        ValuePrefetch((1.0,), copy_s=1.0)
    with pytest.raises(WorkError, match=r"0\.0 s"):
        ValuePrefetch((1.0, 0.5), copy_s=0.0)
