"""How a layer's experts on a device are cut into launches."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.sharing.launches import GROUP, Launch, cut
from planner.decide.baselines import on_demand
from planner.decide.layer_plan import LayerPlan
from planner.describe.estimate import LayerWork


@dataclass(frozen=True)
class Cost:
    """Experts that take longer with more tokens."""

    gpu_token_s: float = 0.5
    link_s: float = 1.0
    gpu_start_s: float = 0.25
    cpu_start_s: float = 0.0

    def cpu_s(self, load: int) -> float:
        return float(load)

    def gpu_s(self, load: int) -> float:
        return self.gpu_token_s * load

    def copy_s(self) -> float:
        return self.link_s


def played(
    work: LayerWork,
    launches: list[Launch],
    cost: Cost,
    kept: set[int],
    resident: set[int],
    staging: int,
) -> float:
    """Run them on a link and a GPU, in order, with so many slots for the staged; the end."""
    loads = dict(work.loads)
    gpu_s = work.gpu_free_s + cost.gpu_start_s
    link_s = work.link_free_s
    arrived_s = dict.fromkeys(resident, 0.0)
    free_s = [0.0] * staging  # when each slot's last reader is done
    held: dict[int, int] = {}
    for copies, experts in launches:
        for expert in copies:
            begin_s = link_s
            if expert not in kept:
                slot = min(
                    (at for at in range(staging) if at not in held.values()), key=free_s.__getitem__
                )
                held[expert] = slot
                begin_s = max(begin_s, free_s[slot])
            link_s = arrived_s[expert] = begin_s + cost.copy_s()
        for expert in experts:
            gpu_s = max(gpu_s, arrived_s[expert])
        for expert in experts:
            gpu_s += cost.gpu_s(loads[expert])
        for expert in experts:
            if expert in held:
                free_s[held.pop(expert)] = gpu_s
    return gpu_s


def all_on_gpu(work: LayerWork, resident: set[int], cost: Cost) -> LayerPlan:
    return on_demand(work, resident, cost)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.sets(st.integers(0, 39)),
    st.sets(st.integers(0, 39)),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0.02, 0.2, 2.0]),
    st.sampled_from([0.0, 3.0]),
)
@settings(max_examples=200, deadline=None)
def test_every_expert_is_computed_once_when_it_is_there(
    loads, held, kept, staging, gpu_token_s, link_free_s
):
    """Copies keep the plan's order and are enqueued in time; staged ones never lack a slot."""
    cost = Cost(gpu_token_s)
    work = LayerWork(0, tuple(enumerate(loads)), link_free_s=link_free_s)
    resident = held & set(range(len(loads)))
    plan = all_on_gpu(work, resident, cost)
    kept &= set(plan.copies)
    launches = cut(work, plan, cost, 9, kept, staging)
    assert sorted(e for launch in launches for e in launch.experts) == sorted(plan.gpu)
    assert tuple(e for launch in launches for e in launch.copies) == plan.copies
    there, staged = set(resident), set()
    for copies, experts in launches:
        there |= set(copies)
        staged |= set(copies) - kept
        assert len(staged) <= staging
        assert set(experts) <= there
        assert len(set(experts) - resident) <= GROUP
        staged -= set(experts)
    assert not staged
    assert all(launch.experts or launch.copies for launch in launches)


@given(
    st.lists(st.integers(1, 9), min_size=8, max_size=40),
    st.sets(st.integers(0, 39)),
    st.sampled_from([0.02, 0.1, 0.3, 2.0]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_device_ends_when_the_plan_says(loads, held, gpu_token_s, keeps):
    """Give or take a group: with four slots for all that is staged, the link hardly ever waits."""
    cost = Cost(gpu_token_s)
    work = LayerWork(0, tuple(enumerate(loads)))
    resident = held & set(range(len(loads)))
    plan = all_on_gpu(work, resident, cost)
    kept = set(plan.copies) if keeps else set()
    launches = cut(work, plan, cost, 9, kept, 4)
    end_s = played(work, launches, cost, kept, resident, 4)
    longest_s = max(cost.gpu_s(load) for load in loads)
    assert plan.gpu_end_s - 1e-9 <= end_s
    assert end_s <= plan.gpu_end_s + 2 * longest_s + 2 * cost.copy_s()


def test_residents_do_not_keep_the_link_waiting():
    """Computed first and at once, they would hold all staging slots: the link would stand still."""
    cost = Cost(gpu_token_s=0.5, link_s=2.0, gpu_start_s=0.0)
    work = LayerWork(0, tuple((expert, 2) for expert in range(30)))
    resident = set(range(20))
    plan = all_on_gpu(work, resident, cost)
    at_once = [Launch((), tuple(range(20)))] + [Launch((e,), (e,)) for e in range(20, 30)]
    assert played(work, at_once, cost, set(), resident, 4) == 34.0
    launches = cut(work, plan, cost, 9, set(), 4)
    assert played(work, launches, cost, set(), resident, 4) == plan.gpu_end_s == 30.0


def test_a_single_tokens_copies_are_computed_one_by_one():
    """They are few, and their residents are done long before the first is there."""
    work = LayerWork(0, tuple((expert, 1) for expert in range(6)))
    plan = all_on_gpu(work, {0, 1, 2}, Cost(gpu_token_s=0.1))
    launches = cut(work, plan, Cost(gpu_token_s=0.1), 1, {3}, 4)
    assert launches == [
        Launch((3,), (0, 1, 2)),
        Launch((), (3,)),
        Launch((4,), (4,)),
        Launch((5,), (5,)),
    ]


def test_a_prompts_launches_are_few():
    """Small groups at both ends, groups of four between; no copies, no cuts."""
    work = LayerWork(0, tuple((expert, 9) for expert in range(40)))
    cost = Cost(gpu_token_s=0.01)
    plan = all_on_gpu(work, set(), cost)
    sizes = [len(launch.experts) for launch in cut(work, plan, cost, 9, set(plan.copies), 4)]
    assert sizes == [0, 1, 1, 2, 3, *[4] * 7, 2, 2, 1]
    whole = all_on_gpu(work, set(range(40)), cost)
    assert cut(work, whole, cost, 9, set(), 4) == [Launch((), whole.gpu)]
