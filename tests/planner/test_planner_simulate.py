"""The simulator against arithmetic done by hand, its laws, and its speed in steps, not seconds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from planner.cost.cost import CostModel
from planner.cost.step_times import total
from planner.decide.baselines import all_cpu, on_demand, static_split
from planner.decide.cache import ExpertCache
from planner.decide.policies.lru import LRU
from planner.decide.policies.mrs import MRS
from planner.decide.policies.static import StaticPopularity
from planner.decide.policy import Policy
from planner.decide.schedule import schedule
from planner.describe.hardware import HardwareSpec, TermPoint
from planner.describe.terms import CPU, DECIDING, DISK, HEAD, JOINING, LINK, MIXER
from planner.foretell.memory import Fit
from planner.foretell.routing import Routing, synthetic
from planner.foretell.run import Run
from planner.foretell.simulate import RamCache, Simulator
from planner_examples import bare_machine, machine, machine_table, quantity, small_model

MODEL = small_model()


def run(
    hardware: HardwareSpec | None = None,
    slots: int = 4,
    routing: Routing | None = None,
    in_ram: float = 1.0,
    prompt: int = 32,
    scheduler: Any = schedule,
    policy: Policy | None = None,
    **options: Any,
) -> Run:
    """Simulate the small model; slots start with experts 0, 1, ..."""
    hardware = hardware or machine()
    cost = CostModel(MODEL, hardware, "q4_0")
    cache = None
    if hardware.gpu:
        cache = ExpertCache(policy or MRS(6, 16), [slots] * 6)
        for layer in range(6):
            for expert in range(slots):
                cache.admit(layer, expert)
    placed = Fit((), 0, 0, (slots,) * 6, in_ram)
    routing = routing or synthetic(MODEL, prompt, 12, seed=1)
    return Simulator(cost, placed, routing, cache, scheduler, **options).simulate(prompt)


def test_cpu_only_decode_is_the_sum_of_its_parts() -> None:
    """Without a GPU a token costs every layer's dense and expert time, one after the other."""
    found = run(bare_machine())
    cost = CostModel(MODEL, bare_machine(), "q4_0")
    layer = MODEL.layers[0]
    for step, context in zip(found.decode, range(33, 45), strict=True):
        each = cost.mixer(layer, 1, context).value + cost.ffn(layer, 1).value
        each += cost.experts.cpu_set_s([1] * 4)
        assert step.duration_s == pytest.approx(6 * each + cost.head(1).value)
    assert found.hit_rate == 0.0


def test_everything_resident_uses_no_link() -> None:
    """With a slot for every expert nothing is copied, nothing runs on the CPU when it is slower."""
    found = run(slots=16)
    assert found.hit_rate == 1.0
    assert found.busy_s.get("link", 0.0) == 0.0
    assert sum(counts["cpu"] + counts["copied"] for counts in found.layers) == 0


def test_all_cpu_and_on_demand_by_hand() -> None:
    """A baseline's step is its lane's arithmetic: all on the CPU, or every miss over the link."""
    cost = CostModel(MODEL, machine(), "q4_0")
    experts, layer = cost.experts, MODEL.layers[0]
    dense = 6 * cost.mixer(layer, 1, 33).value + cost.head(1).value
    shared = cost.ffn(layer, 1).value
    cpu = run(scheduler=all_cpu).decode[0]
    assert cpu.duration_s == pytest.approx(dense + 6 * experts.cpu_set_s([1] * 4))
    none = run(slots=0, scheduler=on_demand).decode[0]
    arrival = 4 * experts.copy_s() + experts.gpu_s(1)
    assert none.duration_s == pytest.approx(dense + 6 * max(shared, arrival))
    assert none.terms[LINK] == pytest.approx(6 * (arrival - shared))


def test_copies_slow_the_cpu_down() -> None:
    """While the link reads the same memory the CPU loses the stated share of its speed."""
    link = {**machine_table()["link"], "cpu_slowdown": quantity(2.0)}
    cpu = {**machine_table()["cpu"], "memory_bytes_per_s": quantity(1.2e9)}
    fair = run(machine(cpu=cpu), slots=0)
    slowed = run(machine(cpu=cpu, link=link), slots=0)
    assert sum(counts["copied"] for counts in fair.layers) > 0
    assert slowed.tpot_s > fair.tpot_s
    # It never takes longer than the slowdown times the undisturbed time.
    assert slowed.tpot_s <= 2.0 * fair.tpot_s


def test_terms_add_up() -> None:
    """The terms of prefill and of every token sum to its duration; bounds lie below."""
    for options in ({}, {"prefetch": True, "refill": True}, {"scheduler": static_split}):
        found = run(**options)
        for step in (found.prefill, *found.decode):
            assert step.duration_s == pytest.approx(sum(step.terms.values()))
            assert 0 < step.bound_s <= step.duration_s * (1 + 1e-9)
        terms = found.decode_terms()
        assert sum(terms.values()) == pytest.approx(found.tpot_s)
        layers = total(found.layer_terms)
        assert layers == pytest.approx({name: terms[name] for name in layers})
        assert sum(layers.values()) == pytest.approx(found.tpot_s - terms[HEAD])
        assert terms[MIXER] > 0
        assert terms[HEAD] > 0


@pytest.mark.parametrize("name", [DECIDING, JOINING])
def test_the_host_takes_its_time_where_it_was_measured(name: str) -> None:
    """Every layer is that much longer, on the host's lane; without a measurement it is nothing."""
    about = {"family": "qwen3_moe", "params": MODEL.experts.params_each, "format": "q4_0"}
    points = tuple(
        TermPoint(term=name, tokens=n, context=n, seconds=s, lane="gpu", **about)
        for n, s in ((1, 0.25), (32, 0.5))
    )
    slow, fast = run(replace(machine(), terms=points), record=1), run()
    assert fast.decode_terms()[name] == 0.0
    assert slow.decode_terms()[name] == pytest.approx(6 * 0.25)
    assert slow.prefill.terms[name] == pytest.approx(6 * 0.5)
    assert slow.tpot_s == pytest.approx(sum(slow.decode_terms().values()))
    spans = [event for event in slow.events if event.name.startswith(name)]
    assert {event.lane for event in spans} == {"cpu"}


def test_hits_and_places_are_counted_per_layer() -> None:
    """Every activated expert ran in one place; hits never exceed what was activated."""
    found = run(prefetch=True, refill=True)
    for counts in found.layers:
        assert counts["activated"] == 12 * 4
        assert counts["cpu"] + counts["resident"] + counts["copied"] == counts["activated"]
        assert 0 <= counts["hits"] <= counts["activated"]
    assert sum(c["hits"] for c in found.layers) == sum(step.hits for step in found.decode)
    assert found.prefetch_used <= found.prefetched


def test_events_do_not_overlap_on_a_lane() -> None:
    """A lane does one thing at a time, over the whole recorded run."""
    slow = {**machine_table()["cpu"], "memory_bytes_per_s": quantity(1.2e9)}
    found = run(machine(cpu=slow), prefetch=True, refill=True, record=5)
    lanes: dict[str, list[tuple[float, float]]] = {}
    for event in found.events:
        assert event.end_s >= event.start_s
        if event.lane != "cache":
            lanes.setdefault(event.lane, []).append((event.start_s, event.end_s))
    assert {"cpu", "gpu", "link"} <= set(lanes)
    for spans in lanes.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-12


def test_same_seed_same_run() -> None:
    """The run is a function of its inputs."""
    first, again = (run(prefetch=True, refill=True, record=2) for _ in range(2))
    assert first.events == again.events
    assert first.tpot_s == again.tpot_s
    assert first.plans == again.plans


def test_ours_is_never_slower_than_a_baseline_with_the_same_cache_contents() -> None:
    """With residency that never changes, the exact schedule takes no longer than any baseline."""
    link = {**machine_table()["link"], "bytes_per_s": quantity(5e9)}
    fixed = StaticPopularity(6, 16, np.zeros((6, 16)))
    for slots in (0, 4, 12):
        ours = run(machine(link=link), slots=slots, policy=fixed)
        for baseline in (all_cpu, on_demand, static_split):
            other = run(machine(link=link), slots=slots, policy=fixed, scheduler=baseline)
            assert other.hit_rate == ours.hit_rate
            assert ours.tpot_s <= other.tpot_s * (1 + 1e-9)


def test_a_better_machine_is_never_slower() -> None:
    """Metamorphic: a faster link, CPU or GPU, or more slots, makes no token slower (no policy)."""
    base = run(scheduler=static_split).tpot_s
    assert run(scheduler=static_split, slots=8).tpot_s <= base * (1 + 1e-9)
    for part, name in (("cpu", "memory_bytes_per_s"), ("gpu", "memory_bytes_per_s")):
        faster = machine().with_values(part, **{name: 1e12})
        assert run(faster, scheduler=static_split).tpot_s <= base * (1 + 1e-9)


def test_prefetch_raises_the_hit_rate() -> None:
    """Where a copy costs less than the CPU, fetching ahead turns misses into hits."""
    slow = {**machine_table()["cpu"], "memory_bytes_per_s": quantity(0.5e9)}
    overhead = {**slow, "layer_overhead_s": quantity(5e-3)}
    plain, ahead = run(machine(cpu=overhead)), run(machine(cpu=overhead), prefetch=True)
    assert ahead.prefetched > 0
    assert ahead.hit_rate > plain.hit_rate
    assert ahead.tpot_s < plain.tpot_s


def test_experts_on_disk_cost_reading_time() -> None:
    """With half of the experts in RAM, misses read from disk and the term says so."""
    whole, half = run(in_ram=1.0), run(in_ram=0.5)
    assert half.tpot_s > whole.tpot_s
    assert half.decode_terms()[DISK] > 0
    assert whole.decode_terms()[DISK] == 0
    bare = run(bare_machine(), in_ram=0.5)
    assert bare.decode_terms()[DISK] > 0


def test_ram_cache_is_lru() -> None:
    """It starts with the first experts and forgets what was used longest ago."""
    cache = RamCache(0.5, [0], 4)
    assert cache.read(0, [0, 1]) == []
    assert cache.read(0, [2]) == [2]
    assert cache.read(0, [1]) == []
    assert cache.read(0, [0]) == [0]
    assert RamCache(1.0, [0], 4).read(0, [1, 2, 3]) == []


def test_sampled_layers_stand_for_all() -> None:
    """Identical layers: simulating half of them at double weight predicts the same time."""
    routing = synthetic(MODEL, 32, 12, seed=1)
    one = replace(
        routing,
        decode=np.repeat(routing.decode[:, :1], 6, axis=1),
        weights=np.repeat(routing.weights[:, :1], 6, axis=1),
        guess=np.repeat(routing.guess[:, :, :1], 6, axis=2),
        prompt=np.repeat(routing.prompt[:1], 6, axis=0),
        prompt_weights=np.repeat(routing.prompt_weights[:1], 6, axis=0),
    )
    full = run(routing=one)
    half = run(routing=one, shares=[2.0, 0.0, 2.0, 0.0, 2.0, 0.0])
    assert half.tpot_s == pytest.approx(full.tpot_s)
    assert half.ttft_s == pytest.approx(full.ttft_s)
    assert half.hit_rate == pytest.approx(full.hit_rate)


def test_batches_share_experts() -> None:
    """Four sequences take less than four times one sequence's step, and more than one's."""
    single = run()
    routing = synthetic(MODEL, 32, 12, batch=4, seed=1)
    cost = CostModel(MODEL, machine(), "q4_0")
    cache = ExpertCache(LRU(6, 16), [4] * 6)
    placed = Fit((), 0, 0, (4,) * 6, 1.0)
    many = Simulator(cost, placed, routing, cache).simulate(32, batch=4)
    assert single.tpot_s < many.tpot_s < 4 * single.tpot_s
    assert many.decode[0].terms[CPU] >= 0
