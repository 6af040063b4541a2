"""Says what a step consisted of where experts are shared with a device, predicted and measured."""

from __future__ import annotations

from hybrid.ledger.metrics import STEP, GenerationTimes, Term
from hybrid.ledger.residual import PREFILL
from hybrid.ledger.timeline import Timeline
from planner.cost.cost import CostModel
from planner.cost.step_times import overhead
from planner.describe.terms import CALL


def step_terms(timeline: Timeline, cost: CostModel, times: GenerationTimes) -> tuple[Term, ...]:
    """Return the terms of a call's steps, the whole first.

    What the steps' own clock does not see surrounds the layers: it is the rest of the time to the
    first token, or from token to token.
    """
    timeline.finish()
    found = []
    for name, phase in timeline.phases.items():
        if not phase.steps:
            continue
        predicted_s, measured_s = phase.predicted.duration_s, phase.measured.duration_s
        around = _overhead(cost, name == PREFILL, times, phase.steps, measured_s)
        if around is not None:
            predicted_s, measured_s = predicted_s + around[0], measured_s + around[1]
        found.append(Term(name, STEP, predicted_s, measured_s))
        found += [Term(name, *row) for row in phase.rows()]
        if around is not None:
            found.append(Term(name, CALL, *around))
    return tuple(found)


def layer_terms(timeline: Timeline) -> tuple[Term, ...]:
    """Return the terms of every layer's part of a call's steps."""
    timeline.finish()
    return tuple(
        Term(name, what, predicted_s, measured_s, layer=layer)
        for name, phase in timeline.phases.items()
        if phase.steps
        for layer, what, predicted_s, measured_s in phase.by_layer()
    )


def _overhead(
    cost: CostModel, first: bool, times: GenerationTimes, steps: int, layers_s: float
) -> tuple[float, float] | None:
    """What surrounds the layers, predicted and measured; None where steps were not all seen."""
    if times.ttft_s is None or steps != (1 if first else times.new_tokens - 1):
        return None
    whole_s = times.ttft_s if first else times.decode_s / steps
    tokens = times.sequences * (times.prompt_tokens if first else 1)
    predicted = overhead(cost, tokens, times.extras, first=first)
    return predicted.value, max(0.0, whole_s - layers_s)
