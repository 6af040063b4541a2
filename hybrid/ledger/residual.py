"""Keeps what every layer was predicted to take beside what it took, over the steps of a phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid.ledger.metrics import WITHIN
from planner.cost.step_times import StepTimes, Terms
from planner.describe.terms import DECIDING, EXPERTS, HEAD, MIXER

PREFILL, DECODE = "prefill", "decode"
LAYER_TERMS = (MIXER, DECIDING, EXPERTS)
"""What a host that shares experts with a device can time, from one layer's join to the next."""


def _terms() -> dict[str, float]:
    return dict.fromkeys(LAYER_TERMS, 0.0)


def _lanes() -> dict[str, float]:
    return dict.fromkeys(WITHIN, 0.0)


@dataclass(slots=True)
class Residual:
    """One layer's seconds over all steps, predicted and measured: terms that add up, and lanes.

    Attributes
    ----------
    predicted, measured
        By term: ``LAYER_TERMS``.
    predicted_lanes, measured_lanes
        By lane and of the join: what happens within the experts' time, all at once.
    planned_s
        When the plans had all experts done.
    copies
        Experts that the plans copied.
    """

    predicted: dict[str, float] = field(default_factory=_terms)
    measured: dict[str, float] = field(default_factory=_terms)
    predicted_lanes: dict[str, float] = field(default_factory=_lanes)
    measured_lanes: dict[str, float] = field(default_factory=_lanes)
    planned_s: float = 0.0
    copies: int = 0


class Phase:
    """Prefill or decode, over the same layers.

    Attributes
    ----------
    layers
        Of every MoE layer.
    predicted_head_s, measured_head_s
        The output head, which is no layer's, of all steps.
    steps
        How many there were.
    activated, hits
        Experts that routers chose, and how many of them were resident.
    """

    def __init__(self) -> None:
        self.layers: list[Residual] = []
        self.predicted_head_s = self.measured_head_s = 0.0
        self.steps = self.activated = self.hits = 0

    def layer(self, index: int) -> Residual:
        """Return one layer's sums."""
        while len(self.layers) <= index:
            self.layers.append(Residual())
        return self.layers[index]

    @property
    def predicted(self) -> StepTimes:
        """Mean of the steps."""
        return self._mean([layer.predicted for layer in self.layers], self.predicted_head_s)

    @property
    def measured(self) -> StepTimes:
        """Mean of the steps."""
        return self._mean([layer.measured for layer in self.layers], self.measured_head_s)

    def _mean(self, layers: list[dict[str, float]], head_s: float) -> StepTimes:
        return StepTimes(tuple(map(self._each, layers)), self._each({HEAD: head_s}))

    def _each(self, sums: Terms) -> dict[str, float]:
        """Mean seconds a step."""
        steps = max(1, self.steps)
        return {name: seconds / steps for name, seconds in sums.items()}

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Yield each term and lane of a step with its predicted and measured mean seconds."""
        predicted, measured = self.predicted.terms, self.measured.terms
        for name in (*LAYER_TERMS, HEAD):
            yield name, predicted.get(name, 0.0), measured.get(name, 0.0)
        steps = max(1, self.steps)
        for name in WITHIN:
            predicted_s = sum(layer.predicted_lanes[name] for layer in self.layers)
            measured_s = sum(layer.measured_lanes[name] for layer in self.layers)
            yield name, predicted_s / steps, measured_s / steps

    def by_layer(self) -> Iterator[tuple[int, str, float, float]]:
        """Yield the layer before every row of its own."""
        for index, layer in enumerate(self.layers):
            predicted = self._each(layer.predicted | layer.predicted_lanes)
            measured = self._each(layer.measured | layer.measured_lanes)
            for name, predicted_s in predicted.items():
                yield index, name, predicted_s, measured[name]
