"""Whose time is whose: a device that ends late, copies that slow the CPU down, deciding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.ledger.metrics import CPU_LANE, GPU_LANE, JOIN, LINK_LANE
from hybrid.ledger.residual import DECODE, PREFILL
from hybrid.ledger.timeline import LayerRecord, Timeline
from planner.describe.terms import DECIDING, EXPERTS, HEAD, MIXER


def cost_of(joining_s: float = 0.0, deciding_s: float = 0.0, handing_s: float = 0.0) -> Any:
    """A machine whose copies halve the CPU's speed."""
    return SimpleNamespace(
        experts=SimpleNamespace(gpu_start_s=0.05, gpu_s=lambda load: 0.1, copy_s=lambda: 0.2),
        host_s=lambda tokens, copies: (
            deciding_s * tokens + handing_s * copies,
            joining_s * tokens,
        ),
        cpu_slowdown=2.0,
    )


COST = cost_of()


def record(at_s: float, computed_until_s: float, tokens: int = 1, layer: int = 0) -> LayerRecord:
    """A layer on the device, a second for each of the host's terms."""
    span = (at_s + 1, computed_until_s)
    event: Any = SimpleNamespace(span=lambda: span, done=lambda: True, what="resident")
    plan = SimpleNamespace(
        layer=layer, cpu=(), gpu=(3,), copies=(), cpu_end_s=0.0, gpu_end_s=0.5, link_end_s=0.0
    )
    work = SimpleNamespace(loads=((3, tokens),), gpu_free_s=0.0, link_free_s=0.0)
    decision: Any = SimpleNamespace(plan=plan, work=work, hits=1)
    return LayerRecord(
        tokens=tokens,
        prompt=tokens > 1,
        decision=decision,
        mixer_s=0.25,
        entered_s=at_s,
        routed_s=at_s + 1,
        decided_s=at_s + 2,
        cpu_end_s=at_s + 2,
        joined_s=at_s + 3,
        computes=[event],
        copies=[],
    )


@pytest.mark.parametrize(("tokens", "phase"), [(1, DECODE), (5, PREFILL)])
def test_the_gpus_lane_is_predicted_with_one_launch_a_layer(tokens: int, phase: str) -> None:
    """A launch beside what the experts take; none in a layer that gives the GPU nothing."""
    timeline = Timeline()
    timeline.add(record(10.0, 12.5, tokens), COST)
    idle = record(13.0, 15.5, tokens, layer=1)
    idle.decision.plan.gpu = ()
    timeline.add(idle, COST)
    lanes = {name: predicted_s for name, predicted_s, _ in timeline.phases[phase].rows()}
    assert lanes[GPU_LANE] == pytest.approx(0.05 + 0.1)


def test_experts_are_predicted_with_what_joining_them_takes() -> None:
    """The plan's end is when the lanes are done; a calibration knows when their sum is there."""
    timeline, cost = Timeline(), cost_of(joining_s=0.125)
    timeline.add(record(10.0, 12.5), cost)
    timeline.add(record(13.0, 15.5, tokens=4), cost)
    for phase, joining_s in ((DECODE, 0.125), (PREFILL, 0.5)):
        layer = timeline.phases[phase].layer(0)
        assert layer.predicted[EXPERTS] == 0.5 + joining_s
        assert layer.predicted_lanes[JOIN] == 0.5 + joining_s
        assert layer.planned_s == 0.5


@pytest.mark.parametrize("joining_s", [0.0, 0.125])
def test_copies_beyond_the_plan_slow_the_cpu_down(joining_s: float) -> None:
    """For as long as the link is busy; a measurement of joining has that in it."""
    timeline, slowed = Timeline(), record(10.0, 12.5)
    plan, copy = slowed.decision.plan, SimpleNamespace(span=lambda: None, done=lambda: True)
    plan.cpu, plan.cpu_end_s, plan.gpu, plan.copies, plan.link_end_s = (1,), 2.0, (3, 4), (4,), 0.5
    slowed.copies.extend([copy, copy])  # type: ignore[list-item]
    timeline.add(slowed, cost_of(joining_s))
    layer = timeline.phases[DECODE].layer(0)
    cpu_s = 2.0 if joining_s else 2.0 + (0.5 + 0.2) / 2
    assert layer.predicted_lanes[CPU_LANE] == cpu_s
    assert layer.predicted[EXPERTS] == cpu_s + joining_s
    assert layer.predicted_lanes[LINK_LANE] == 2 * 0.2
    assert (layer.planned_s, layer.copies) == (2.0, 1)


@pytest.mark.parametrize(("late_s", "experts_s"), [(-0.5, 1.0), (0.0, 1.0), (0.75, 1.75)])
def test_a_device_that_ends_after_the_join_computes_experts(
    late_s: float, experts_s: float
) -> None:
    """The next router waits for it: that is no time of attention's. The sum stays what it is."""
    timeline = Timeline()
    timeline.add(record(10.0, 13.0 + late_s), COST)
    timeline.add(record(13.0, 15.5, layer=1), COST)
    timeline.step(False, 4.0, 0.0)
    phase = timeline.phases[DECODE]
    measured = phase.measured
    assert measured.terms[EXPERTS] == experts_s + 1.0
    # The CPU had none.
    assert {name: measured_s for name, _, measured_s in phase.rows()}[JOIN] == experts_s + 1.0
    assert measured.terms[MIXER] == 3.0 - experts_s
    assert measured.duration_s == 10.0
    routers = {
        layer: seconds
        for layer, name, _, seconds in timeline.phases[DECODE].by_layer()
        if name == MIXER
    }
    assert routers == {0: 1.0, 1: 2.0 - experts_s}


@pytest.mark.parametrize(("late_s", "first_s"), [(0.75, 3.25), (5.0, 0.0)])
def test_the_head_waits_for_the_last_layer_of_a_device_that_is_late(
    late_s: float, first_s: float
) -> None:
    """The next step's first router does not: the head came between. No head takes less than 0."""
    timeline = Timeline(keep=True)
    timeline.add(record(10.0, 13.0 + late_s), COST)
    timeline.step(False, 4.0, 0.0)
    timeline.add(record(17.0, 19.5), COST)
    timeline.step(False, 4.0, 0.0)
    timeline.finish()
    terms = timeline.phases[DECODE].measured.terms
    assert (2 * terms[EXPERTS], 2 * terms[MIXER]) == (2.0 + late_s, 2.0)
    assert 2 * terms[HEAD] == first_s + 4.0
    spans = [
        (e.start_s, e.end_s) for e in timeline.events if e.name.startswith(("layer 0: att", HEAD))
    ]
    assert sorted(spans) == [(0.0, 1.0), (7.0 - first_s, 7.0), (7.0, 8.0), (10.0, 14.0)]


def test_a_layer_that_ends_after_its_steps_head_keeps_heads_and_steps_together() -> None:
    """A copy that is long on its way holds the books of two steps up; they come out the same."""
    timeline = Timeline()
    arrived = False
    copy: Any = SimpleNamespace(span=lambda: None, done=lambda: arrived, what="copy")
    first = record(10.0, 13.75)
    first.copies.append(copy)
    timeline.add(first, COST)
    timeline.step(False, 4.0, 0.0)
    timeline.add(record(17.0, 20.5), COST)
    timeline.step(False, 4.0, 0.0)
    arrived = True
    timeline.finish()
    assert 2 * timeline.phases[DECODE].measured.terms[HEAD] == 2 * 4.0 - 0.75 - 0.5


def test_spans_say_what_was_predicted_and_lie_behind_each_other() -> None:
    """From the first layer on; on the device attention begins when the layer before is done."""
    timeline = Timeline(keep=True)
    timeline.add(record(5.0, 8.0), COST)
    timeline.forget()
    timeline.add(record(10.0, 13.25), COST)
    timeline.add(record(13.0, 15.5, layer=1), COST)
    timeline.step(False, 4.0, 3.0)
    timeline.finish()
    gpu = sorted(
        (event.start_s, event.end_s, event.name, event.predicted_s)
        for event in timeline.events
        if event.lane == GPU_LANE
    )
    assert gpu == [
        (0.0, 1.0, "layer 0: attention and router", 0.25),
        (1.0, 3.25, "resident", None),
        (3.25, 4.0, "layer 1: attention and router", 0.25),
        (4.0, 5.5, "resident", None),
        (6.0, 10.0, "output head", 3.0),
    ]


def test_deciding_is_predicted_for_the_tokens_and_the_copies() -> None:
    """As the cost model has it, never from what it took: a measurement predicts nothing."""
    timeline, cost = Timeline(), cost_of(deciding_s=0.125, handing_s=1.0)
    one, many = record(0.0, 3.0), record(3.0, 6.0, tokens=4)
    many.decision.plan.copies = (3,)
    for layer in (one, many):
        timeline.add(layer, cost)
    predicted = [timeline.phases[phase].layer(0).predicted for phase in (DECODE, PREFILL)]
    assert [terms[DECIDING] for terms in predicted] == [0.125, 0.5 + 1.0]
    unmeasured = Timeline()
    for at_s in (0.0, 3.0):
        unmeasured.add(record(at_s, at_s + 3), COST)
    assert unmeasured.phases[DECODE].layer(0).predicted[DECIDING] == 0.0
    assert unmeasured.phases[DECODE].layer(0).measured[DECIDING] == 2.0
