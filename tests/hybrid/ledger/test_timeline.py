"""Whose time is whose: a device that ends late, and what deciding is predicted to take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.ledger.metrics import JOIN
from hybrid.ledger.timeline import (
    DECIDING,
    DECODE,
    EXPERTS,
    GPU,
    HEAD,
    PREFILL,
    ROUTER,
    LayerRecord,
    Timeline,
)

COST: Any = SimpleNamespace(gpu_start_s=0.05, gpu_s=lambda load: 0.1, copy_s=lambda: 0.2)


def record(at_s: float, computed_until_s: float, tokens: int = 1, layer: int = 0) -> LayerRecord:
    """A layer on the device, a second for each of the host's terms."""
    span = (at_s + 1, computed_until_s)
    event: Any = SimpleNamespace(span=lambda: span, done=lambda: True, what="resident")
    plan = SimpleNamespace(layer=layer, cpu=(), gpu=(3,), copies=(), makespan_s=0.5, cpu_end_s=0.0)
    work = SimpleNamespace(loads=((3, tokens),))
    decision: Any = SimpleNamespace(plan=plan, work=work, hits=1)
    return LayerRecord(
        tokens=tokens,
        prompt=tokens > 1,
        decision=decision,
        dense_s=0.25,
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
    assert timeline.phases[phase].predicted.lanes[GPU] == pytest.approx(0.05 + 0.1)


def test_experts_are_predicted_with_what_joining_them_takes() -> None:
    """The plan's end is when the lanes are done; a calibration knows when their sum is there."""
    timeline = Timeline()
    timeline.joining = lambda tokens: 0.125 * tokens
    timeline.add(record(10.0, 12.5), COST)
    timeline.add(record(13.0, 15.5, tokens=4), COST)
    assert timeline.phases[DECODE].predicted.terms[EXPERTS] == 0.5 + 0.125
    assert timeline.phases[DECODE].predicted.lanes[JOIN] == 0.5 + 0.125
    assert timeline.phases[PREFILL].predicted.terms[EXPERTS] == 0.5 + 0.5


@pytest.mark.parametrize(("late_s", "experts_s"), [(-0.5, 1.0), (0.0, 1.0), (0.75, 1.75)])
def test_a_device_that_ends_after_the_join_computes_experts(
    late_s: float, experts_s: float
) -> None:
    """The next router waits for it: that is no time of attention's. The sum stays what it is."""
    timeline = Timeline()
    timeline.add(record(10.0, 13.0 + late_s), COST)
    timeline.add(record(13.0, 15.5, layer=1), COST)
    timeline.step(False, 4.0, 0.0)
    measured = timeline.phases[DECODE].measured
    assert measured.terms[EXPERTS] == experts_s + 1.0
    assert measured.lanes[JOIN] == experts_s + 1.0  # the CPU had none
    assert measured.terms[ROUTER] == 3.0 - experts_s
    assert measured.step_s == 10.0
    routers = {
        layer: seconds
        for layer, name, _, seconds in timeline.phases[DECODE].by_layer()
        if name == ROUTER
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
    measured = timeline.phases[DECODE].measured
    assert (measured.terms[EXPERTS], measured.terms[ROUTER]) == (2.0 + late_s, 2.0)
    assert measured.terms[HEAD] == first_s + 4.0
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
    assert timeline.phases[DECODE].measured.terms[HEAD] == 2 * 4.0 - 0.75 - 0.5


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
        if event.lane == GPU
    )
    assert gpu == [
        (0.0, 1.0, "layer 0: attention and router", 0.25),
        (1.0, 3.25, "resident", None),
        (3.25, 4.0, "layer 1: attention and router", 0.25),
        (4.0, 5.5, "resident", None),
        (6.0, 10.0, "output head", 3.0),
    ]


def test_deciding_is_predicted_from_a_calibration_or_from_before() -> None:
    """Where it was measured for so many tokens, that; else what it took lately, 0 at first."""
    known, unknown = Timeline(), Timeline()
    known.deciding = lambda tokens, copies: 0.125 * tokens + copies
    for timeline in (known, unknown):
        for at_s, tokens in ((0.0, 1), (3.0, 1), (6.0, 4)):
            timeline.add(record(at_s, at_s + 3, tokens), COST)
    decode, prefill = (
        [timeline.phases[phase].predicted.terms[DECIDING] for timeline in (known, unknown)]
        for phase in (DECODE, PREFILL)
    )
    assert decode == [0.25, 1.0]
    assert prefill == [0.5, 0.0]
