"""The scheduler against brute force, its baselines, its own bound, and recorded plans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive_planner as naive
from planner.decide.baselines import BASELINES, all_cpu, hybrimoe_greedy, on_demand, static_split
from planner.decide.bounds import relaxations
from planner.decide.decode_table import DecodeTable
from planner.decide.dynamic import dynamic_program
from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import Problem, timeline
from planner.decide.schedule import exact_rule, schedule, solve
from planner.describe.estimate import LayerWork
from planner.errors import CostError, WorkError

CASES = sorted((Path(__file__).parents[1] / "cases").glob("schedule_*.json"))


@dataclass(frozen=True)
class LinearCost:
    """Durations that grow with the load from a floor; enough of a cost model to schedule by."""

    cpu_start_s: float = 0.0
    gpu_start_s: float = 0.0
    cpu_floor_s: float = 0.0
    cpu_token_s: float = 1.0
    gpu_floor_s: float = 1.0
    gpu_token_s: float = 0.0
    link_s: float = 3.0

    def cpu_s(self, load: int) -> float:
        return max(self.cpu_floor_s, load * self.cpu_token_s)

    def gpu_s(self, load: int) -> float:
        return max(self.gpu_floor_s, load * self.gpu_token_s)

    def copy_s(self) -> float:
        return self.link_s


def random_problem(rng: np.random.Generator, n: int, *, uniform: bool) -> Problem:
    """Draw a problem: equal GPU and copy times, or every time its own."""
    gpu_s = np.full(n, rng.uniform(0.05, 1.5)) if uniform else rng.uniform(0.05, 2.0, n)
    copy_s = np.full(n, rng.uniform(0.1, 4.0)) if uniform else rng.uniform(0.1, 4.0, n)
    return Problem(
        layer=0,
        experts=tuple(range(n)),
        loads=tuple(rng.integers(1, 50, n).tolist()),
        cpu_s=tuple(rng.uniform(0.1, 3.0, n).tolist()),
        gpu_s=tuple(gpu_s.tolist()),
        copy_s=tuple(copy_s.tolist()),
        resident=tuple((rng.random(n) < rng.uniform()).tolist()),
        cpu_start_s=float(rng.uniform(0, 1) * rng.integers(0, 2)),
        gpu_start_s=float(rng.uniform(0, 1) * rng.integers(0, 2)),
        gpu_free_s=float(rng.uniform(0, 2) * rng.integers(0, 2)),
        link_free_s=float(rng.uniform(0, 3) * rng.integers(0, 2)),
    )


times = st.floats(0, 8, allow_subnormal=False)


@st.composite
def problems(draw: Callable[..., object], max_experts: int = 20) -> Problem:
    """Draw problems of every shape: ties, zeros, equal and unequal times."""
    n = draw(st.integers(0, max_experts))

    def column(elements: st.SearchStrategy[object]) -> tuple[object, ...]:
        if draw(st.booleans()):
            return (draw(elements),) * n
        return tuple(draw(st.lists(elements, min_size=n, max_size=n)))

    return Problem(
        layer=draw(st.integers(0, 90)),
        experts=tuple(sorted(draw(st.sets(st.integers(0, 255), min_size=n, max_size=n)))),
        loads=column(st.integers(1, 40)),
        cpu_s=column(times),
        gpu_s=column(times),
        copy_s=column(times),
        resident=column(st.booleans()),
        cpu_start_s=draw(times),
        gpu_start_s=draw(times),
        gpu_free_s=draw(times),
        link_free_s=draw(times),
    )


def work_of(problem: Problem) -> tuple[LayerWork, set[int]]:
    work = LayerWork(
        problem.layer,
        tuple(zip(problem.experts, problem.loads, strict=True)),
        problem.gpu_free_s,
        problem.link_free_s,
    )
    return work, {problem.experts[i] for i in problem.residents}


def test_the_papers_worked_example():
    """HybriMoE's Fig. 5: the CPU runs A, B, E; C is copied; the GPU runs D, C after the shared."""
    a, b, c, d, e = range(5)
    work = LayerWork(0, ((a, 1), (b, 1), (c, 3), (d, 4), (e, 1)), gpu_free_s=1.0)
    for plan in (hybrimoe_greedy(work, {d, e}, LinearCost()), schedule(work, {d, e}, LinearCost())):
        assert plan.cpu == (a, b, e)
        assert plan.gpu == (d, c)
        assert plan.copies == (c,)
        assert plan.makespan_s == 4.0
    assert static_split(work, {d, e}, LinearCost()).makespan_s == 5.0
    assert on_demand(work, {d, e}, LinearCost()).makespan_s == 10.0
    assert all_cpu(work, {d, e}, LinearCost()).makespan_s == 10.0


def test_equals_brute_force_where_gpu_and_copy_times_are_equal():
    """On 5,000 random instances of up to 9 experts the exact rule alone finds the optimum."""
    rng = np.random.default_rng(2504)
    for _ in range(5000):
        problem = random_problem(rng, int(rng.integers(1, 10)), uniform=True)
        best_s = naive.best_over_all_sets_s(problem)
        assert exact_rule(problem).makespan_s == pytest.approx(best_s, rel=1e-12)


def test_close_to_brute_force_on_general_instances():
    """Within 1% on average and 5% at worst of the optimum, with every time different."""
    rng = np.random.default_rng(5897)
    excess = []
    for _ in range(400):
        problem = random_problem(rng, int(rng.integers(1, 10)), uniform=False)
        best_s = naive.best_over_all_sets_s(problem)
        excess.append(solve(problem).makespan_s / best_s - 1)
    assert np.mean(excess) <= 0.01
    assert max(excess) <= 0.05
    assert min(excess) >= -1e-12


def test_more_experts_than_the_dynamic_program_places_stay_close_to_brute_force():
    """Where the relaxation decides most experts, the plan is still near the optimum of 17."""
    rng = np.random.default_rng(17)
    excess = []
    for _ in range(12):
        problem = random_problem(rng, 17, uniform=False)
        excess.append(solve(problem).makespan_s / naive.best_over_all_sets_s(problem) - 1)
    assert np.mean(excess) <= 0.01
    assert max(excess) <= 0.05


def test_brute_force_over_sets_is_brute_force_over_orders():
    """Johnson's order, which the oracle itself uses, is never beaten by another order."""
    rng = np.random.default_rng(1954)
    for _ in range(60):
        problem = random_problem(rng, int(rng.integers(1, 6)), uniform=False)
        assert naive.best_over_all_sets_s(problem) == pytest.approx(
            naive.best_over_all_orders_s(problem), rel=1e-12
        )


@given(problems())
@settings(deadline=None)
def test_bound_plan_and_baselines_are_in_order(problem):
    """lower_bound <= plan <= every baseline, to the last bit, and the plan is valid."""
    plan = solve(problem)
    plan.validate(*work_of(problem))
    assert plan.lower_bound_s <= plan.makespan_s
    for baseline in BASELINES:
        other = baseline.solve(problem)
        other.validate(*work_of(problem))
        assert plan.makespan_s <= other.makespan_s


@given(problems(max_experts=7))
@settings(deadline=None)
def test_no_bound_exceeds_the_optimum(problem):
    """Neither a plan's bound nor the linear relaxation's rules out a plan that exists."""
    best_s = naive.best_over_all_sets_s(problem)
    slack = 1e-9 * (1 + best_s)
    assert solve(problem).lower_bound_s <= best_s + slack
    if problem.missing or problem.residents:
        relaxed_s = min(relaxed.bound_s for relaxed in relaxations(problem))
        idle_s = (idle.solve(problem).makespan_s for idle in (all_cpu, on_demand))
        assert min(relaxed_s, *idle_s) <= best_s + slack


@given(problems(max_experts=40), st.sampled_from([0.0, 0.5, 4.0, 1e9]))
@settings(max_examples=150, deadline=None)
def test_a_search_is_only_left_out_where_it_could_save_less(problem, search_s):
    """No plan ends earlier by more than the search would take; baselines never end earlier."""
    found, exact = solve(problem, search_s), solve(problem)
    assert exact.makespan_s <= found.makespan_s <= exact.makespan_s + search_s + 1e-9
    assert found.lower_bound_s <= exact.makespan_s + 1e-9
    assert found.makespan_s <= min(baseline.solve(problem).makespan_s for baseline in BASELINES)


def test_the_relaxation_is_tight_on_large_layers():
    """With 128 experts the bound is within 3% of the plan on average: neither is loose."""
    rng = np.random.default_rng(128)
    gaps = [solve(random_problem(rng, 128, uniform=False)).gap for _ in range(20)]
    assert 0 < np.mean(gaps) < 0.03


@given(problems())
@settings(max_examples=50, deadline=None)
def test_same_input_same_bytes(problem):
    """Two calls, and a trip through JSON, give the same bytes."""
    text = solve(problem).to_json()
    assert solve(replace(problem)).to_json() == text
    assert LayerPlan.from_json(text).to_json() == text


@given(problems(), st.floats(0.25, 4), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_renaming_experts_changes_nothing(problem, factor, offset):
    """Shifting every id and the layer moves the ids of the plan and nothing else."""
    renamed = replace(problem, experts=tuple(expert + offset for expert in problem.experts))
    plan, other = solve(problem), solve(renamed)
    assert other.cpu == tuple(expert + offset for expert in plan.cpu)
    assert other.gpu == tuple(expert + offset for expert in plan.gpu)
    assert other.makespan_s == plan.makespan_s


@given(problems(max_experts=8), st.data())
@settings(max_examples=60, deadline=None)
def test_one_more_resident_expert_never_makes_a_small_layer_slower(problem, data):
    """Up to 8 experts plans are optimal, and a copy less to make cannot hurt an optimum."""
    if not problem.missing:
        return
    gained = data.draw(st.sampled_from(problem.missing))
    resident = tuple(i == gained or held for i, held in enumerate(problem.resident))
    better = solve(replace(problem, resident=resident))
    assert better.makespan_s <= solve(problem).makespan_s * (1 + 1e-12)


@given(problems())
@settings(deadline=None)
def test_the_timeline_agrees_with_the_plan(problem):
    """Lanes never overlap themselves, no expert is computed before its copy, ends match."""
    plan = solve(problem)
    spans = timeline(problem, plan)
    ends = {"cpu": 0.0, "gpu": problem.gpu_free_s, "link": problem.link_free_s}
    copied_s = {span.expert: span.end_s for span in spans if span.lane == "link"}
    for span in spans:
        assert span.start_s >= ends[span.lane]
        if span.lane == "gpu":
            assert span.start_s >= copied_s.get(span.expert, 0.0)
        ends[span.lane] = span.end_s
    assert (ends["gpu"], ends["link"]) == (plan.gpu_end_s, plan.link_end_s)
    assert ends["cpu"] == (plan.cpu_end_s if plan.cpu else 0.0)
    assert sorted(s.expert for s in spans if s.lane != "link") == list(problem.experts)


def test_the_dynamic_program_merges_states_only_when_it_must(monkeypatch):
    """A narrow program says that it merged, and stays within a tick an expert of the optimum."""
    rng = np.random.default_rng(11)
    merged = 0
    for _ in range(40):
        problem = random_problem(rng, 10, uniform=False)
        limit_s = min(baseline.solve(problem).makespan_s for baseline in BASELINES) + 1e-9
        wide, exhaustive = dynamic_program(problem, range(10), (), limit_s)
        assert exhaustive
        monkeypatch.setattr("planner.decide.dynamic.WIDTH", 64)
        narrow, kept_all = dynamic_program(problem, range(10), (), limit_s)
        monkeypatch.undo()
        merged += not kept_all
        found_s = narrow.makespan_s if narrow else limit_s
        best_s = wide.makespan_s if wide else limit_s
        assert best_s <= found_s <= best_s + 10 * limit_s / math.isqrt(64)
    assert merged > 10


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_plans(path):
    """Recorded inputs still give the recorded placement, order and times."""
    case = json.loads(path.read_text())
    work = LayerWork(
        layer=case["layer"],
        loads=tuple(tuple(pair) for pair in case["loads"]),
        gpu_free_s=case["gpu_free_s"],
        link_free_s=case["link_free_s"],
    )
    cost = LinearCost(**case["cost"])
    plan = schedule(work, case["residency"], cost)
    assert json.loads(plan.to_json()) == case["plan"]
    assert plan.makespan_s == case["makespan_s"]
    for baseline in BASELINES:
        other = baseline(work, case["residency"], cost)
        assert other.makespan_s == case["baselines"][baseline.name]


def test_there_are_golden_plans():
    """The recorded cases are found where the test above looks for them."""
    assert len(CASES) >= 6


@given(st.integers(0, 8), st.integers(0, 8), times, times, st.sampled_from([0, 0.1]), st.data())
@settings(max_examples=100, deadline=None)
def test_the_decode_table_gives_what_schedule_gives(
    hits, misses, gpu_free_s, link_free_s, gpu_start_s, data
):
    """Same makespan for every split of up to 8 experts, in the table and off it."""
    hits, misses = min(hits, 8 - misses), misses
    cost = LinearCost(0.3, gpu_start_s, cpu_token_s=0.7, gpu_floor_s=0.2, link_s=1.9)
    table = DecodeTable(cost, 8, gpu_free_s=0.5)
    ids = sorted(data.draw(st.sets(st.integers(0, 99), min_size=8, max_size=8)))
    chosen = data.draw(st.permutations(ids))[: hits + misses]
    residency = set(chosen[:hits])
    split = sorted(chosen[:hits]), sorted(chosen[hits:])
    loads = tuple((expert, 1) for expert in sorted(chosen))
    work = LayerWork(7, loads, gpu_free_s=0.5)
    assert table.plan(work, *split) == schedule(work, residency, cost)
    assert table.makespan_s(hits, misses) == schedule(work, residency, cost).makespan_s
    busy = replace(work, link_free_s=link_free_s)
    for elsewhere in (busy, replace(busy, gpu_free_s=gpu_free_s)):
        plan, best = table.plan(elsewhere, *split), schedule(elsewhere, residency, cost)
        plan.validate(elsewhere, residency)
        assert plan.makespan_s == pytest.approx(best.makespan_s, rel=1e-12)
        assert len(plan.copies) == len(best.copies)
        assert plan.link_end_s == pytest.approx(best.link_end_s, rel=1e-12)
    unequal = replace(work, loads=tuple((expert, 1 + expert % 3) for expert in sorted(chosen)))
    assert table.plan(unequal, *split).makespan_s == pytest.approx(
        schedule(unequal, residency, cost).makespan_s, rel=1e-12
    )


def test_the_decode_table_refuses_what_it_cannot_hold():
    """More experts than built for and an empty table are named."""
    table = DecodeTable(LinearCost(), 4)
    with pytest.raises(WorkError, match="up to 4 experts, got 3 hits and 2 misses"):
        table.makespan_s(3, 2)
    with pytest.raises(WorkError, match="got 0 and 1"):
        DecodeTable(LinearCost(), 0)


def test_a_launch_is_paid_once_and_only_where_the_gpu_computes():
    """Three residents end a launch after three experts; a launch that costs too much is saved."""
    work, residency = LayerWork(0, ((0, 9), (1, 9), (2, 9)), gpu_free_s=0.25), {0, 1, 2}
    plan = schedule(work, residency, LinearCost(gpu_start_s=2.0))
    assert (plan.gpu, plan.cpu) == ((0, 1, 2), ())
    assert plan.gpu_end_s == 0.25 + 2.0 + 3.0
    idle = schedule(work, residency, LinearCost(gpu_start_s=30.0))
    assert (idle.gpu, idle.cpu) == ((), (0, 1, 2))
    assert (idle.cpu_end_s, idle.gpu_end_s, idle.makespan_s) == (27.0, 0.25, 27.0)


def test_no_activated_experts_is_an_empty_plan():
    """A step whose router chose only zero-computation experts costs what the GPU already does."""
    plan = schedule(LayerWork(2, (), gpu_free_s=0.25), {1, 2}, LinearCost())
    assert (plan.cpu, plan.gpu, plan.copies) == ((), (), ())
    assert plan.makespan_s == 0.25
    assert plan.gap == 0


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_cost_model_without_an_answer_is_refused(bad):
    """A negative, infinite or undefined duration is an error, not a plan."""
    with pytest.raises(CostError, match="duration of"):
        schedule(LayerWork(0, ((0, 1),)), (), LinearCost(link_s=bad))


def _plan(**changes: object) -> LayerPlan:
    plan = LayerPlan(0, (1,), (2, 3), (3,), 1.0, 2.0, 1.5, 2.0, "exact")
    return plan._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": (1, 2)}, r"experts \[2\] more than once"),
        ({"cpu": (4, 1)}, "sort them"),
        ({"copies": (1,)}, r"copies \[1\] but runs"),
        ({"copies": (3, 3)}, "copy each expert at most once"),
        ({"gpu_end_s": -1.0}, "gpu_end_s = -1.0"),
        ({"link_end_s": math.inf}, "link_end_s = inf"),
        ({"lower_bound_s": 3.0}, "below its lower bound"),
    ],
)
def test_an_inconsistent_plan_is_refused(changes, message):
    """Each way a plan can contradict itself is named."""
    _plan().validate()
    with pytest.raises(WorkError, match=message):
        _plan(**changes).validate()


def test_a_plan_for_other_work_is_refused():
    """A plan must cover its work exactly and copy exactly what is missing."""
    work = LayerWork(0, ((1, 1), (2, 1), (3, 1)))
    _plan().validate(work, {2})
    with pytest.raises(WorkError, match=r"leaves out experts \[\] and adds experts \[3\]"):
        _plan().validate(LayerWork(0, ((1, 1), (2, 1))))
    with pytest.raises(WorkError, match="layer 4"):
        _plan().validate(replace(work, layer=4))
    with pytest.raises(WorkError, match=r"copies \[3\], but its GPU experts lack \[2, 3\]"):
        _plan().validate(work, {1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "got list"),
        ('{"layer":0}', "has the fields"),
        (_plan().to_json().replace('"layer":0', '"layer":-1'), "layer cannot be -1"),
        (_plan().to_json().replace("[1]", '["1"]'), "cpu cannot be"),
        (_plan().to_json().replace('"exact"', "3"), "method cannot be 3"),
        (_plan().to_json().replace("1.5", "true"), "link_end_s cannot be True"),
        (_plan().to_json().replace("[1]", "[2]"), "more than once"),
    ],
)
def test_json_that_is_not_a_plan_is_refused(text, message):
    """Truncated, incomplete and mistyped plans are named; nothing is guessed."""
    with pytest.raises(WorkError, match=message):
        LayerPlan.from_json(text)


def test_the_gap_is_relative_to_the_bound():
    """2 s against a bound of 1.6 s is a gap of a quarter; a bound of zero gives infinity."""
    assert _plan(lower_bound_s=1.6).gap == pytest.approx(0.25)
    assert _plan(lower_bound_s=0.0).gap == math.inf
