"""What a simulated run did, as values: steps with their terms, events on lanes, counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from planner.cost.step_times import StepTimes
from planner.decide.layer_plan import LayerPlan
from planner.describe.terms import TERMS


@dataclass(frozen=True, slots=True)
class Event:
    """Something on a lane (``cpu``, ``gpu``, ``link``, ``disk``), or an instant of the cache.

    ``predicted_s`` is how long it was to take, where it was measured.
    """

    lane: str
    name: str
    start_s: float
    end_s: float
    predicted_s: float | None = None


@dataclass
class Step:
    """One forward pass: the prompt, or one token of every sequence."""

    bound_s: float = 0.0
    """How long it would take with every layer at its plan's lower bound."""
    terms: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    activated: int = 0
    hits: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return sum(self.terms.values())

    def add(self, times: StepTimes) -> None:
        """Add a forward pass, or a part of one."""
        for name, seconds in times.terms.items():
            self.terms[name] += seconds


@dataclass
class Run:
    """What happened."""

    prefill: Step
    decode: list[Step]
    layer_terms: tuple[dict[str, float], ...]
    """Of every decoder layer: mean seconds of each term per decode step."""
    layers: list[Counter[str]]
    """Per MoE layer, over all decode steps: ``activated``, ``hits``, and the experts that ran
    on the ``cpu``, ``resident`` on the GPU, or ``copied`` to it."""
    events: list[Event]
    busy_s: dict[str, float]
    """Seconds of work on each lane over all decode steps."""
    plans: list[LayerPlan]
    """The plans of the last decode step, one per MoE layer."""
    prefetched: int
    prefetch_used: int
    """Experts fetched in decode before their router asked, and those of them it then chose."""
    refilled: int
    """Experts that the CPU computed in decode and idle link time brought to the cache after."""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.prefill.duration_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a decode step: time per output token of one sequence."""
        return sum(step.duration_s for step in self.decode) / len(self.decode)

    @property
    def bound_s(self) -> float:
        """Mean of the decode steps' lower bounds."""
        return sum(step.bound_s for step in self.decode) / len(self.decode)

    @property
    def hit_rate(self) -> float:
        """Hits over activated experts, over all decode steps."""
        activated = sum(step.activated for step in self.decode)
        return sum(step.hits for step in self.decode) / activated if activated else 0.0

    def decode_terms(self) -> dict[str, float]:
        """Mean seconds of each term per decode step; they add up to ``tpot_s``."""
        return {
            term: sum(step.terms[term] for step in self.decode) / len(self.decode) for term in TERMS
        }
