"""Whose time is whose: a device that ends late, and what deciding is predicted to take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.sharing.timeline import (
    DECIDING,
    DECODE,
    EXPERTS,
    PREFILL,
    ROUTER,
    LayerRecord,
    Timeline,
)

COST: Any = SimpleNamespace(gpu_s=lambda load: 0.1, copy_s=lambda: 0.2)


def record(at_s: float, computed_until_s: float, tokens: int = 1) -> LayerRecord:
    """A layer on the device, a second for each of the host's terms."""
    span = (at_s + 1, computed_until_s)
    event: Any = SimpleNamespace(span=lambda: span, done=lambda: True, what="resident")
    plan = SimpleNamespace(layer=0, cpu=(), gpu=(3,), copies=(), makespan_s=0.5, cpu_end_s=0.0)
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


@pytest.mark.parametrize(("late_s", "experts_s"), [(-0.5, 1.0), (0.0, 1.0), (0.75, 1.75)])
def test_a_device_that_ends_after_the_join_computes_experts(
    late_s: float, experts_s: float
) -> None:
    """The next router waits for it: that is no time of attention's. The sum stays what it is."""
    timeline = Timeline()
    timeline.add(record(10.0, 13.0 + late_s), COST)
    timeline.add(record(13.0, 15.5), COST)
    timeline.step(False, 4.0, 0.0)
    measured = timeline.phases[DECODE].measured
    assert measured.terms[EXPERTS] == experts_s + 1.0
    assert measured.terms[ROUTER] == 3.0 - experts_s
    assert measured.step_s == 10.0


def test_deciding_is_predicted_from_a_calibration_or_from_before() -> None:
    """Where it was measured for so many tokens, that; else what it took lately, 0 at first."""
    known, unknown = Timeline(), Timeline()
    known.deciding = lambda tokens: 0.125 * tokens
    for timeline in (known, unknown):
        for at_s, tokens in ((0.0, 1), (3.0, 1), (6.0, 4)):
            timeline.add(record(at_s, at_s + 3, tokens), COST)
    decode, prefill = (
        [timeline.phases[phase].predicted.terms[DECIDING] for timeline in (known, unknown)]
        for phase in (DECODE, PREFILL)
    )
    assert decode == [0.25, 1.0]
    assert prefill == [0.5, 0.0]
