"""Cache policies against textbook twins, exhaustive search and each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive_planner as naive
from planner.decide.cache import ExpertCache
from planner.decide.capacity import equal_capacities, hits_by_capacity, marginal_capacities
from planner.decide.oracles import SCH, Belady
from planner.decide.policies.arc import ARC
from planner.decide.policies.blend import Blend
from planner.decide.policies.forecast import Forecast
from planner.decide.policies.lfu import LFU
from planner.decide.policies.lru import LRU
from planner.decide.policies.mrs import MRS
from planner.decide.policies.static import StaticPopularity
from planner.decide.policy import Policy
from planner.decide.replay import Replay, _one_by_one, replay
from planner.errors import CapacityError, TraceError

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"
EXPERTS = 6

requests = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=60)


def single(chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One layer, one expert a token: the textbook's stream of requests."""
    ids = np.array(chosen)[:, None, None]
    return ids, np.full(ids.shape, 0.5)


@st.composite
def traces(draw, max_steps: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Up to three layers with one to three experts a token, and their weights."""
    layers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    steps = draw(st.integers(1, max_steps))
    row = st.lists(st.integers(0, EXPERTS - 1), min_size=top_k, max_size=top_k, unique=True)
    ids = [[draw(row) for _ in range(layers)] for _ in range(steps)]
    weight = st.integers(1, 4).map(lambda quarter: quarter / 4)
    weights = [[[draw(weight) for _ in line] for line in step] for step in ids]
    return np.array(ids), np.array(weights)


def policies(ids: np.ndarray, capacities: list[int]) -> list[Policy]:
    """One of each, fresh, for a trace of EXPERTS experts."""
    layers = ids.shape[1]
    counts = np.arange(layers * EXPERTS).reshape(layers, EXPERTS) % 4
    return [
        LRU(layers, EXPERTS),
        LFU(layers, EXPERTS),
        MRS(layers, EXPERTS),
        Blend(layers, EXPERTS),
        ARC(layers, EXPERTS),
        StaticPopularity(layers, EXPERTS, counts),
        Forecast(layers, EXPERTS),
        SCH(ids, EXPERTS, window=4),
        Belady(ids, EXPERTS),
    ]


@given(requests, st.integers(1, EXPERTS))
@settings(deadline=None)
def test_lru_lfu_and_arc_are_the_textbooks(chosen, capacity):
    """On single requests the three have exactly the hits of their plain twins."""
    for policy, hits in (
        (LRU(1, EXPERTS), naive.lru_hits(chosen, capacity)),
        (LFU(1, EXPERTS), naive.lfu_hits(chosen, capacity)),
        (ARC(1, EXPERTS), naive.arc_hits(chosen, capacity)),
    ):
        assert replay(policy, *single(chosen), [capacity]).hits.tolist() == [hits]


@given(traces(max_steps=7), st.integers(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_belady_has_the_most_hits_possible(trace, spare, must_admit):
    """Exhaustive search over every decision finds no more hits than Belady."""
    ids, weights = trace
    capacity = ids.shape[2] + spare
    found = replay(
        Belady(ids, EXPERTS),
        ids,
        weights,
        [capacity] * ids.shape[1],
        "always" if must_admit else "worth",
    )
    for layer in range(ids.shape[1]):
        best = naive.most_hits(ids[:, layer].tolist(), capacity, must_admit=must_admit)
        assert found.hits[layer] == best


@given(traces(max_steps=20), st.lists(st.integers(0, EXPERTS), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_policy_beats_belady(trace, capacities):
    """Every policy, either way of admitting, at any capacities of the layers."""
    ids, weights = trace
    capacities = capacities[: ids.shape[1]]
    for admission in ("always", "worth"):
        # A layer with fewer slots than A cannot always admit: the freer rule bounds it.
        free = admission == "worth" or min(capacities) < ids.shape[2]
        rule = "worth" if free else "always"
        best = replay(Belady(ids, EXPERTS), ids, weights, capacities, rule)
        for policy in policies(ids, capacities):
            hits = replay(policy, ids, weights, capacities, admission).hits
            assert (hits <= best.hits).all(), policy.name


@given(traces(max_steps=20), st.lists(st.integers(0, EXPERTS), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_batched_replay_is_the_cache_itself(trace, capacities):
    """Replaying all layers at once decides as ExpertCache does, expert by expert."""
    ids, weights = trace
    capacities = capacities[: ids.shape[1]]
    for admission in ("always", "worth"):
        pairs = zip(policies(ids, capacities), policies(ids, capacities), strict=True)
        for batched, single_steps in pairs:
            cache = ExpertCache(single_steps, capacities)
            slow = _one_by_one(cache, ids, weights, admission)
            cache.check_integrity()
            fast = replay(batched, ids, weights, capacities, admission).hits
            assert fast.tolist() == slow.tolist(), batched.name


def test_mrs_is_the_papers_recurrence():
    """S <- alpha * TopP(s) + (1 - alpha) * S, by hand, for the layers of the event only."""
    policy = MRS(2, 3, alpha=0.25)
    policy.observe(np.array([1]), np.array([[0, 2]]), np.array([[0.8, 0.4]]))
    policy.observe(np.array([1]), np.array([[2, 1]]), np.array([[0.4, 0.2]]))
    expected = [0.75 * 0.25 * 0.8, 0.25 * 0.2, 0.75 * 0.25 * 0.4 + 0.25 * 0.4]
    assert policy.value(np.array([1]))[0] == pytest.approx(expected)
    assert policy.value(np.array([0])).tolist() == [[0.0, 0.0, 0.0]]
    assert policy.victim(1, 1, [0, 2]) == 0


def test_blend_is_two_moving_averages():
    """Shares of the weight, kept by (1 - rate) per token; a prompt decays by all its tokens."""
    policy = Blend(2, 3)
    policy.observe(np.array([1]), np.array([[0, 2]]), np.array([[0.3, 0.1]]), tokens=5)
    policy.observe_one(1, np.array([2]), np.array([0.7]), tokens=1)
    fast, slow = np.zeros(3), np.zeros(3)
    for share, tokens in (([0.75, 0.0, 0.25], 5), ([0.0, 0.0, 1.0], 1)):
        keep_fast, keep_slow = 0.7**tokens, 0.99**tokens
        fast = keep_fast * fast + (1 - keep_fast) * np.array(share)
        slow = keep_slow * slow + (1 - keep_slow) * np.array(share)
    assert policy.value_one(1) == pytest.approx(fast + 3 * slow)
    assert policy.value(np.array([0, 1]))[1] == pytest.approx(fast + 3 * slow)
    assert policy.value_one(0).tolist() == [0.0, 0.0, 0.0]


def test_a_step_is_learned_before_its_layer_is_asked_for():
    """Learning may be put off; whoever asks for values or evicts finds it done, in any layer."""
    now, late = Blend(2, EXPERTS), ExpertCache(Blend(2, EXPERTS), [1, 1])
    for layer, ids in ((0, [1, 2]), (1, [0, 5]), (0, [2, 3])):
        late.step(layer, ids, [0.25, 0.75])
        now.observe_one(layer, np.array(ids), np.array([0.25, 0.75]), 1)
        for other in (1 - layer, layer):
            np.testing.assert_array_equal(late.value(other), now.value_one(other))
    late.admit(1, 0)
    late.step(1, [4, 5], [0.5, 0.5])
    late.step(0, [4, 5], [0.5, 0.5])
    assert late.offer(1, 5) == (True, 0)


def test_hits_by_capacity_is_exact_for_lru():
    """One pass gives what a replay gives at every capacity."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.stack([rng.permutation(EXPERTS)[:2] for _ in range(3)]) for _ in range(80)])
    weights = rng.random(ids.shape)
    curve = hits_by_capacity(LRU(3, EXPERTS), ids, weights)
    for capacity in range(2, EXPERTS + 1):
        found = replay(LRU(3, EXPERTS), ids, weights, [capacity] * 3)
        assert curve[:, capacity].tolist() == found.hits.tolist()


@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.lists(
            st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=layers, max_size=layers
        )
    ),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_marginal_capacities_are_the_best_split(worth, total):
    """No other split of the budget is worth more, concave or not."""
    total = min(total, 3 * len(worth))
    capacities = marginal_capacities(worth, total)
    assert sum(capacities) == total

    def best(layers: list[list[int]], left: int) -> float:
        if not layers:
            return 0.0 if left == 0 else -np.inf
        return max(layers[0][c] + best(layers[1:], left - c) for c in range(min(3, left) + 1))

    assert sum(line[c] for line, c in zip(worth, capacities, strict=True)) == best(worth, total)


def test_equal_capacities_differ_by_at_most_one():
    """The whole budget is given away, the first layers get what is left over."""
    assert equal_capacities(11, 4, 8) == (3, 3, 3, 2)
    with pytest.raises(CapacityError, match="33 slots for 4 layers of 8"):
        equal_capacities(33, 4, 8)
    with pytest.raises(CapacityError, match="-1 slots"):
        marginal_capacities(np.zeros((2, 3)), -1)


def test_forecast_learns_which_experts_follow_which():
    """On a cycle longer than the cache, where LRU never hits, it keeps those that come next."""
    period, copies = 24, 40
    cycle = np.arange(period * copies) % period
    ids, weights = cycle[:, None, None], np.ones((len(cycle), 1, 1))
    tail = len(cycle) // 2
    lru = replay(LRU(1, period), ids, weights, [period // 3])
    assert lru.hits.sum() == 0
    head = replay(Forecast(1, period), ids[:tail], weights[:tail], [period // 3]).hits.sum()
    learned = replay(Forecast(1, period), ids, weights, [period // 3]).hits.sum() - head
    best = replay(Belady(ids, period), ids, weights, [period // 3])
    assert learned / (len(cycle) - tail) > 0.6 * best.hit_rate


def test_forecast_is_deterministic_and_layers_do_not_mix():
    """Two runs agree to the bit, and a layer's answers ignore what other layers see."""
    rng = np.random.default_rng(4)
    ids = rng.permuted(np.tile(np.arange(8), (600, 2, 1)), axis=2)[:, :, :2]
    weights = rng.random(ids.shape)
    both, again, alone = Forecast(2, 8), Forecast(2, 8), Forecast(2, 8)
    first = np.array([0])
    for chosen, weight in zip(ids, weights, strict=True):
        both.observe(np.arange(2), chosen, weight)
        again.observe(np.arange(2), chosen, weight)
        alone.observe(first, chosen[:1], weight[:1])
    assert (both.value(np.arange(2)) == again.value(np.arange(2))).all()
    assert both.value(first) == pytest.approx(alone.value(first), rel=1e-5)


@pytest.mark.skipif(not TRACES.exists(), reason="the recorded traces are not on this machine")
@pytest.mark.parametrize("name", ["intent", "law"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_on_recorded_routing_the_policies_rank_as_claimed(name, share):
    """LRU < MRS < Blend < Forecast < Belady on the first 1,500 tokens of DeepSeek-V2-Lite."""
    with np.load(TRACES / f"esft_dsv2lite_{name}.npz") as arrays:
        ids, weights = arrays["expert_ids"][:1500], arrays["routing_weights"][:1500]
    _, layers, _ = ids.shape
    capacities = [int(64 * share)] * layers
    rates = [
        replay(policy, ids, weights, capacities).hit_rate
        for policy in (
            LRU(layers, 64),
            MRS(layers, 64),
            Blend(layers, 64),
            Forecast(layers, 64),
            Belady(ids, 64),
        )
    ]
    assert rates == sorted(rates)
    assert rates[3] > 0.8 * rates[4]


def test_bad_input_is_refused():
    """Wrong shapes and values are named, with what to do."""
    ids, weights = single([0, 1])
    with pytest.raises(CapacityError, match="1 capacities for 2 layers"):
        ExpertCache(LRU(2, 4), [1])
    with pytest.raises(CapacityError, match="layer 1 has 5 slots for 4 experts"):
        ExpertCache(LRU(2, 4), [1, 5])
    with pytest.raises(CapacityError, match=r"counts are \[2\]"):
        StaticPopularity(2, 4, [1, 2])
    with pytest.raises(CapacityError, match="alpha 0"):
        MRS(1, 4, alpha=0)
    with pytest.raises(CapacityError, match="looks 0 steps ahead"):
        SCH(ids, 4, window=0)
    with pytest.raises(TraceError, match="for a policy of 2 layers"):
        replay(LRU(2, 4), ids, weights, [1, 1])
    with pytest.raises(TraceError, match="saw another choice at step 0"):
        replay(Belady(ids, 4), ids[::-1], weights, [1])


def test_a_replay_reports_hits_over_activated():
    """The hit rate is over all layers together, each activated expert counted once."""
    assert Replay(np.array([3, 1]), np.array([4, 4])).hit_rate == 0.5


@given(traces(), st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_offering_to_many_is_offering_to_one_after_the_other(trace, wanted, data):
    """Whatever the policy, the same experts get the same slots."""
    ids, weights = trace
    layers = ids.shape[1]
    capacities = [data.draw(st.integers(0, EXPERTS)) for _ in range(layers)]
    for one, many in zip(policies(ids, capacities), policies(ids, capacities), strict=True):
        caches = ExpertCache(one, capacities), ExpertCache(many, capacities)
        for step, weight in zip(ids, weights, strict=True):
            for layer in range(layers):
                for cache in caches:
                    cache.step(layer, step[layer], weight[layer])
                missing = [e for e in wanted if e not in caches[0].residency(layer)]
                expected = []
                for expert in missing:
                    worth, evicted = caches[0].offer(layer, expert)
                    expected += [(expert, evicted)] * worth
                assert caches[1].offer_each(layer, missing) == expected
                assert caches[0].residency(layer) == caches[1].residency(layer)
