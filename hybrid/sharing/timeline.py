"""What every layer was predicted to take beside what it took, term by term and lane by lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpu_experts.device import Event as DeviceEvent
from hybrid.metrics import LANES
from planner.director import Decision
from planner.outcome import Event
from planner.problem import LayerCost

ROUTER, DECIDING, EXPERTS, HEAD = TERMS = (
    "attention and router",
    "deciding",
    "experts",
    "output head",
)
"""What a step's time is made of, from one layer's join to the next; they add up to it."""
CPU, GPU, LINK = LANES
PREFILL, DECODE = "prefill", "decode"
RECENT = 0.05
"""Weight of the newest layer in what deciding usually takes."""
RECORDED_EVENTS = 200_000
"""Spans kept for a timeline; a longer run keeps its beginning."""


@dataclass(slots=True)
class LayerRecord:
    """One layer's experts in one step; instants are on ``time.perf_counter``'s clock.

    Attributes
    ----------
    tokens, prompt
        How many tokens the layer saw, and whether several were of one sequence.
    decision
        What was decided, in seconds from that moment.
    dense_s
        Predicted: attention and router before it.
    entered_s, routed_s, decided_s, cpu_end_s, joined_s
        Measured: the layer before was done, the router's answer was on the host, the device had its
        work, the CPU was done with its own, the sum was there.
    computes, copies
        What the device was given.
    """

    tokens: int
    prompt: bool
    decision: Decision
    dense_s: float
    entered_s: float
    routed_s: float
    decided_s: float
    cpu_end_s: float
    joined_s: float
    computes: list[DeviceEvent]
    copies: list[DeviceEvent]

    def done(self) -> bool:
        """Whether the device has finished everything of it."""
        return all(event.done() for event in (*self.computes, *self.copies))


@dataclass
class Sums:
    """Seconds over all steps of a phase, by term and by lane."""

    steps: int = 0
    terms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 0.0))
    lanes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANES, 0.0))

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return sum(self.terms.values()) / self.steps if self.steps else 0.0


@dataclass
class Phase:
    """Prefill or decode: predicted and measured side by side, over the same layers."""

    predicted: Sums = field(default_factory=Sums)
    measured: Sums = field(default_factory=Sums)
    activated: int = 0
    hits: int = 0

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Yield each term and lane with its predicted and measured mean seconds a step."""
        steps = max(1, self.measured.steps)
        for kind in ("terms", "lanes"):
            predicted, measured = getattr(self.predicted, kind), getattr(self.measured, kind)
            for name in predicted:
                yield name, predicted[name] / steps, measured[name] / steps


class Timeline:
    """Collects records while a model runs; a device may finish a layer's copies much later.

    Parameters
    ----------
    keep
        Whether single spans are kept for a trace viewer; sums always are.

    Attributes
    ----------
    deciding
        Predicts what deciding takes in a layer of so many tokens, where that was measured.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.deciding: Callable[[int], float] | None = None
        self.phases = {PREFILL: Phase(), DECODE: Phase()}
        self.events: list[Event] = []
        self._usual: dict[bool, float] = {}
        self._open: deque[LayerRecord] = deque()
        self._start_s: float | None = None

    def restart(self) -> None:
        """Begin new sums; single spans stay."""
        self.finish()
        self.phases = {PREFILL: Phase(), DECODE: Phase()}

    def phase(self, prompt: bool) -> Phase:
        """Return the phase of a prompt's steps or of the others."""
        return self.phases[PREFILL if prompt else DECODE]

    def add(self, record: LayerRecord, cost: LayerCost) -> None:
        """Take one layer's record; ``cost`` tells what its experts were predicted to take."""
        phase, plan, work = self.phase(record.prompt), record.decision.plan, record.decision.work
        phase.activated += len(work.loads)
        phase.hits += record.decision.hits
        terms, lanes = phase.measured.terms, phase.measured.lanes
        terms[ROUTER] += record.routed_s - record.entered_s
        terms[DECIDING] += record.decided_s - record.routed_s
        terms[EXPERTS] += record.joined_s - record.decided_s
        lanes[CPU] += record.cpu_end_s - record.decided_s if plan.cpu else 0.0
        terms, lanes = phase.predicted.terms, phase.predicted.lanes
        terms[ROUTER] += record.dense_s
        terms[DECIDING] += self._usually(record)
        terms[EXPERTS] += plan.makespan_s
        lanes[CPU] += plan.cpu_end_s if plan.cpu else 0.0
        if record.tokens == 1:
            lanes[GPU] += len(plan.gpu) * cost.gpu_s(1)
        else:
            given = frozenset(plan.gpu)
            lanes[GPU] += sum([cost.gpu_s(load) for expert, load in work.loads if expert in given])
        lanes[LINK] += len(record.copies) * cost.copy_s()
        self._open.append(record)
        while self._open and self._open[0].done():
            self._close(self._open.popleft())

    def _usually(self, record: LayerRecord) -> float:
        """Predict what deciding takes: what it took lately where it was not measured before.

        The very first layer has nothing to go by then.
        """
        if self.deciding is not None:
            return self.deciding(record.tokens)
        prompt, took_s = record.prompt, record.decided_s - record.routed_s
        usual_s = self._usual.get(prompt)
        self._usual[prompt] = took_s if usual_s is None else usual_s + RECENT * (took_s - usual_s)
        return usual_s or 0.0

    def step(self, prompt: bool, head_s: float, predicted_head_s: float) -> None:
        """End a step; the time after its last layer was ``head_s``."""
        phase = self.phase(prompt)
        phase.predicted.steps += 1
        phase.measured.steps += 1
        phase.measured.terms[HEAD] += head_s
        phase.predicted.terms[HEAD] += predicted_head_s

    def finish(self) -> None:
        """Take what the device has finished by now; what it lost is left out."""
        while self._open:
            self._close(self._open.popleft())

    def _close(self, record: LayerRecord) -> None:
        """Add the device's lanes, whose spans are known now, and keep single spans if wanted.

        A device may still compute the layer's experts when the host has gone on to the next
        router, which waits for them: that time is the experts'.
        """
        measured = self.phase(record.prompt).measured
        lanes, ends_s = measured.lanes, [record.joined_s]
        keep = self.keep and len(self.events) < RECORDED_EVENTS
        if self._start_s is None:
            self._start_s = record.entered_s
        zero_s = self._start_s
        for lane, events in ((GPU, record.computes), (LINK, record.copies)):
            for event in events:
                span = event.span()
                if span is None:
                    continue
                lanes[lane] += span[1] - span[0]
                if lane == GPU:
                    ends_s.append(span[1])
                if keep:
                    self.events.append(Event(lane, event.what, span[0] - zero_s, span[1] - zero_s))
        late_s = max(ends_s) - record.joined_s
        measured.terms[EXPERTS] += late_s
        measured.terms[ROUTER] -= late_s
        if not keep:
            return
        name = f"layer {record.decision.plan.layer}"
        spans = [
            (GPU, f"{name}: attention and router", record.entered_s, record.routed_s),
            (CPU, f"{name}: deciding", record.routed_s, record.decided_s),
        ]
        if record.decision.plan.cpu:
            experts = ", ".join(map(str, record.decision.plan.cpu))
            spans.append((CPU, f"{name}: experts {experts}", record.decided_s, record.cpu_end_s))
        if record.joined_s > record.cpu_end_s:
            spans.append((CPU, f"{name}: join", record.cpu_end_s, record.joined_s))
        for lane, what, start_s, end_s in spans:
            self.events.append(Event(lane, what, start_s - zero_s, end_s - zero_s))
