"""The one way from the cost model to a step's time, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.cost.cost import CostModel
from planner.cost.step_times import (
    StepTimes,
    contended_s,
    dense_times,
    experts_times,
    extra,
    overhead,
    total,
)
from planner.decide.problem import Problem
from planner.describe.estimate import LayerWork
from planner.describe.hardware import HardwareSpec, TermPoint
from planner.describe.terms import (
    CALL,
    CPU,
    DECIDING,
    DENSE,
    DISK,
    EXPERTS,
    GPU,
    HEAD,
    JOINING,
    LINK,
    MIXER,
    SAMPLING,
    TEXT,
)
from planner_examples import bare_machine, machine, machine_table, quantity, small_model

MODEL = small_model()
WORK = LayerWork(0, ((2, 1), (5, 1), (7, 1), (9, 1)), 1e-5, 0.0)


def slow_link(slowdown: float = 2.0) -> HardwareSpec:
    """A machine whose copies slow the CPU down."""
    return machine(link={**machine_table()["link"], "cpu_slowdown": quantity(slowdown)})


def measured(hardware: HardwareSpec, **seconds: float) -> HardwareSpec:
    """The same with terms of the experts that a calibration measured for one token."""
    about = {"family": "qwen3_moe", "params": MODEL.experts.params_each, "format": "q4_0"}
    about |= {"tokens": 1, "context": 1, "lane": "gpu"}
    points = tuple(TermPoint(term=name, seconds=s, **about) for name, s in seconds.items())
    return replace(hardware, terms=points)


def placed(cost: CostModel, gpu: list[int], copies: list[int]) -> Any:
    """``WORK`` with these positions on the GPU, and these of them copied."""
    held = {expert for at, (expert, _) in enumerate(WORK.loads) if at not in copies}
    return Problem.of(WORK, held, cost.experts).plan(gpu, copies, "by hand")


def test_dense_parts_are_those_of_every_layer() -> None:
    """In the layers' order, whichever are alike."""
    model = small_model(decoder_sparse_step=1, mlp_only_layers=[0, 3])
    cost = CostModel(model, machine(), "q4_0")
    found = dense_times(cost, 8, 40, 2)
    assert found.layers == [
        (cost.mixer(layer, 8, 40, 2).value, cost.ffn(layer, 8).value) for layer in model.layers
    ]
    assert found.layers[0] != found.layers[1]
    assert found.head_s == cost.head(2, 8).value


def test_what_copies_take_from_the_cpu() -> None:
    """The stated share of its speed, as long as both run."""
    assert contended_s(4.0, 2.0, 1.0) == 4.0
    assert contended_s(4.0, 2.0, 2.0) == 5.0
    assert contended_s(4.0, 99.0, 2.0) == 8.0


def test_the_cpu_is_slowed_down_unless_joining_was_measured() -> None:
    """A measurement of joining has it that copies slow the CPU down; nothing counts twice."""
    for hardware in (slow_link(), measured(slow_link(), joining=0.25)):
        cost = CostModel(MODEL, hardware, "q4_0")
        plan = placed(cost, [1], [1])
        found = experts_times(cost, 1, WORK, plan, plan.link_end_s + 1e-3)
        if hardware.terms:
            assert (found.cpu_end_s, found.joining_s) == (plan.cpu_end_s, 0.25)
        else:
            slowed_s = contended_s(plan.cpu_end_s, plan.link_end_s + 1e-3, 2.0)
            assert (found.cpu_end_s, found.joining_s) == (slowed_s, 0.0)
            assert slowed_s > plan.cpu_end_s
        assert found.gpu_end_s == plan.gpu_end_s


def test_experts_count_for_the_lane_that_ends_last() -> None:
    """The CPU, the GPU, or the link that it waited for; shared experts go first."""
    cost = CostModel(MODEL, machine(), "q4_0")
    gpu_s = cost.experts.gpu_s(1)
    for gpu, copies, last in (([], [], CPU), ([0, 1, 2, 3], [], GPU), ([3], [3], LINK)):
        plan = placed(cost, gpu, copies)
        found = experts_times(cost, 1, WORK, plan, plan.link_end_s)
        assert found.terms() == {
            DECIDING: 0.0,
            DENSE: 1e-5,
            last: pytest.approx(plan.makespan_s - 1e-5),
            JOINING: 0.0,
        }
        assert found.gpu_busy_s == len(gpu) * gpu_s
    known = CostModel(MODEL, measured(machine(), joining=0.25, deciding=0.5, handing=0.125), "q4_0")
    found = experts_times(known, 1, WORK, plan, plan.link_end_s)
    assert (found.terms()[DECIDING], found.terms()[JOINING]) == (0.5 + 0.125, 0.25)


def test_what_is_read_from_disk_is_waited_for() -> None:
    """By whoever computes it; the time beyond the plan is the disk's."""
    cost = CostModel(MODEL, machine(), "q4_0")
    plan = placed(cost, [3], [3])
    read_s = cost.disk_read(1).value
    for expert, more_s in ((2, cost.experts.cpu_s(1)), (9, cost.experts.copy_s())):
        found = experts_times(cost, 1, WORK, plan, plan.link_end_s, [expert])
        more_s += cost.experts.gpu_s(1) if expert == 9 else 0.0
        assert found.end_s == read_s + more_s
        assert found.terms()[DISK] == pytest.approx(read_s + more_s - plan.makespan_s)
        assert sum(found.terms().values()) == pytest.approx(found.end_s)


def test_a_step_as_a_host_times_it() -> None:
    """Dense layers count for what comes after them; the whole stays what it is."""
    dense, moe = {MIXER: 1.0, DENSE: 2.0}, {MIXER: 1.0, DECIDING: 4.0, DENSE: 8.0, GPU: 16.0}
    step = StepTimes((dense, moe, dense, dense, moe, dense), {HEAD: 32.0})
    assert total(step.layers)[MIXER] == 6.0
    timed = step.as_timed([terms is moe for terms in step.layers])
    assert timed.layers == (
        {MIXER: 4.0, DECIDING: 4.0, EXPERTS: 24.0},
        {MIXER: 7.0, DECIDING: 4.0, EXPERTS: 24.0},
    )
    assert timed.around == {HEAD: 35.0}
    assert timed.duration_s == step.duration_s == sum(step.terms.values())


def test_what_surrounds_a_step() -> None:
    """Drawing counts for every token, writing from the second on; nothing that was not measured."""
    cost = CostModel(MODEL, bare_machine(), "q4_0")
    assert overhead(cost, 1, (SAMPLING, TEXT)).value == 0.0
    about = {"family": "qwen3_moe", "params": MODEL.head_params, "format": "bf16"}
    points = tuple(
        TermPoint(term=term, tokens=1, context=1, seconds=seconds, **about)
        for term, seconds in ((CALL, 1.0), (SAMPLING, 2.0), (TEXT, 4.0))
    )
    cost = CostModel(MODEL, replace(bare_machine(), terms=points), "q4_0")
    assert overhead(cost, 1).value == 1.0
    assert overhead(cost, 1, (SAMPLING, TEXT)).value == 7.0
    assert overhead(cost, 1, (SAMPLING, TEXT), first=True).value == 3.0
    assert extra(cost, TEXT, first=True).value == 0.0
