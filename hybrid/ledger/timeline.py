"""Times a model's layers while it runs and sets beside that what they were predicted to take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gpu_experts.device import Event as DeviceEvent
from hybrid.ledger.metrics import CPU_LANE, GPU_LANE, JOIN, LINK_LANE
from hybrid.ledger.residual import DECODE, PREFILL, Phase
from planner.cost.cost import CostModel
from planner.cost.step_times import experts_times
from planner.decide.director import Decision
from planner.describe.terms import DECIDING, EXPERTS, HEAD, MIXER
from planner.foretell.run import Event

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
    mixer_s
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
    mixer_s: float
    entered_s: float
    routed_s: float
    decided_s: float
    cpu_end_s: float
    joined_s: float
    computes: list[DeviceEvent]
    copies: list[DeviceEvent]

    def done(self) -> bool:
        """Whether the device has finished everything of it."""
        for event in self.computes:  # every layer asks: no generator
            if not event.done():
                return False
        for event in self.copies:  # noqa: SIM110
            if not event.done():
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Head:
    """The output head of a step: when the host began it, how long it took and was to take."""

    phase: Phase
    begin_s: float
    seconds: float
    predicted_s: float


class Timeline:
    """Collects records while a model runs; a device may finish a layer's copies much later.

    Parameters
    ----------
    keep
        Whether single spans are kept for a trace viewer; sums always are.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.phases = {PREFILL: Phase(), DECODE: Phase()}
        self.events: list[Event] = []
        self._open: deque[LayerRecord] = deque()
        self._start_s: float | None = None
        self._joined_s = 0.0
        # How long the device still computed the last layer's experts when the host had gone on,
        # and the heads that came after such layers.
        self._late_s = 0.0
        self._heads: deque[_Head] = deque()
        self._layers_closed = False

    def restart(self) -> None:
        """Begin new sums; single spans stay."""
        self.finish()
        self.phases = {PREFILL: Phase(), DECODE: Phase()}

    def forget(self) -> None:
        """Begin anew with sums and spans, after a warm-up."""
        self.restart()
        self.events.clear()
        self._start_s = None

    def phase(self, prompt: bool) -> Phase:
        """Return the phase of a prompt's steps or of the others."""
        return self.phases[PREFILL if prompt else DECODE]

    def add(self, record: LayerRecord, cost: CostModel) -> None:
        """Take one layer's record; ``cost`` predicts what its experts take."""
        phase, decision = self.phase(record.prompt), record.decision
        plan, work = decision.plan, decision.work
        phase.activated += len(work.loads)
        phase.hits += decision.hits
        layer = phase.layer(plan.layer)
        terms, lanes = layer.measured, layer.measured_lanes
        terms[MIXER] += record.routed_s - record.entered_s
        terms[DECIDING] += record.decided_s - record.routed_s
        terms[EXPERTS] += record.joined_s - record.decided_s
        lanes[CPU_LANE] += record.cpu_end_s - record.decided_s if plan.cpu else 0.0
        lanes[JOIN] += record.joined_s - record.cpu_end_s
        copies, copied, copy_s = len(plan.copies), len(record.copies), cost.experts.copy_s()
        link_end_s = max(plan.link_end_s, work.link_free_s) + (copied - copies) * copy_s
        times = experts_times(cost, record.tokens, work, plan, link_end_s)
        experts_s = times.end_s + times.joining_s
        cpu_s = times.cpu_end_s if plan.cpu else 0.0
        terms, lanes = layer.predicted, layer.predicted_lanes
        terms[MIXER] += record.mixer_s
        terms[DECIDING] += times.deciding_s
        terms[EXPERTS] += experts_s
        lanes[CPU_LANE] += cpu_s
        lanes[JOIN] += experts_s - cpu_s
        lanes[GPU_LANE] += times.gpu_busy_s
        lanes[LINK_LANE] += copied * copy_s
        layer.planned_s += times.planned_s
        layer.copies += copies
        self._joined_s = record.joined_s
        if self._start_s is None:
            self._start_s = record.entered_s
        self._open.append(record)
        while self._open and self._open[0].done():
            self._close(self._open.popleft())

    def step(self, prompt: bool, head_s: float, predicted_head_s: float) -> None:
        """End a step; the time after its last layer was ``head_s``."""
        phase = self.phase(prompt)
        phase.steps += 1
        phase.predicted_head_s += predicted_head_s
        phase.measured_head_s += head_s
        self._heads.append(_Head(phase, self._joined_s, head_s, predicted_head_s))

    def finish(self) -> None:
        """Take what the device has finished by now; what it lost is left out."""
        while self._open:
            self._close(self._open.popleft())
        while self._heads:
            self._end_step()
        self._late_s, self._layers_closed = 0.0, False

    def _end_step(self) -> None:
        """Take what a head waited for the last layer's experts off it, and show it."""
        late_s, self._late_s = self._late_s, 0.0
        if self._heads:
            head = self._heads.popleft()
            waited_s = min(late_s, head.seconds)
            head.phase.measured_head_s -= waited_s
            if self._keeps():
                begin_s, end_s = head.begin_s + waited_s, head.begin_s + head.seconds
                self._show(GPU_LANE, HEAD, begin_s, end_s, head.predicted_s)

    def _close(self, record: LayerRecord) -> None:
        """Add the device's lanes, whose spans are known now, and keep single spans if wanted.

        A device may still compute the layer's experts when the host has gone on to the next
        router, which waits for them: that time is the experts'.
        """
        index = record.decision.plan.layer
        layer = self.phase(record.prompt).layer(index)
        began_s = record.entered_s
        if index:
            # The host sees attention begin when it has joined: it does when the device is done.
            waited_s = min(self._late_s, record.routed_s - record.entered_s)
            layer.measured[MIXER] -= waited_s
            began_s += waited_s
        elif self._layers_closed:
            self._end_step()
        self._layers_closed = True
        plan, keeps, last_s = record.decision.plan, self._keeps(), record.joined_s
        for lane, events in ((GPU_LANE, record.computes), (LINK_LANE, record.copies)):
            for event in events:
                span = event.span()
                if span is None:
                    continue
                layer.measured_lanes[lane] += span[1] - span[0]
                if lane == GPU_LANE:
                    last_s = max(last_s, span[1])
                if keeps:
                    self._show(lane, event.what, *span)
        late_s = last_s - record.joined_s
        layer.measured[EXPERTS] += late_s
        layer.measured_lanes[JOIN] += late_s
        self._late_s = late_s
        if not keeps:
            return
        name = f"layer {index}"
        self._show(GPU_LANE, f"{name}: {MIXER}", began_s, record.routed_s, record.mixer_s)
        self._show(CPU_LANE, f"{name}: deciding", record.routed_s, record.decided_s)
        if plan.cpu:
            what = f"{name}: experts {', '.join(map(str, plan.cpu))}"
            self._show(CPU_LANE, what, record.decided_s, record.cpu_end_s, plan.cpu_end_s)
        if record.joined_s > record.cpu_end_s:
            self._show(CPU_LANE, f"{name}: join", record.cpu_end_s, record.joined_s)

    def _keeps(self) -> bool:
        """Whether there is room for more spans, and a wish."""
        return self.keep and len(self.events) < RECORDED_EVENTS

    def _show(
        self, lane: str, what: str, start_s: float, end_s: float, predicted_s: float | None = None
    ) -> None:
        """Keep a span for a trace viewer."""
        zero_s = self._start_s or 0.0
        self.events.append(Event(lane, what, start_s - zero_s, end_s - zero_s, predicted_s))
