"""What every layer was predicted to take beside what it took, term by term and lane by lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpu_experts.device import Event as DeviceEvent
from hybrid.ledger.metrics import JOIN, LANES, WITHIN
from planner.decide.director import Decision
from planner.decide.problem import LayerCost
from planner.foretell.run import Event

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
    """Seconds over all steps of a phase, by term, and of lanes and joins within them."""

    steps: int = 0
    terms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 0.0))
    lanes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WITHIN, 0.0))

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return sum(self.terms.values()) / self.steps if self.steps else 0.0

    def add(self, other: Sums) -> None:
        """Add another's seconds."""
        for name, seconds in other.terms.items():
            self.terms[name] += seconds
        for name, seconds in other.lanes.items():
            self.lanes[name] += seconds


@dataclass
class Both:
    """Predicted and measured side by side."""

    predicted: Sums = field(default_factory=Sums)
    measured: Sums = field(default_factory=Sums)

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Yield each term and lane with its predicted and measured mean seconds a step."""
        steps = max(1, self.measured.steps)
        for kind in ("terms", "lanes"):
            predicted, measured = getattr(self.predicted, kind), getattr(self.measured, kind)
            for name in predicted:
                yield name, predicted[name] / steps, measured[name] / steps


class Phase:
    """Prefill or decode, over the same layers.

    Attributes
    ----------
    layers
        Of every MoE layer; the output head is no layer's.
    activated, hits
        Experts that routers chose, and how many of them were resident.
    """

    def __init__(self) -> None:
        self.layers: list[Both] = []
        self.activated = self.hits = 0
        self.steps = 0
        self.head_s = [0.0, 0.0]
        """Of all steps, predicted and measured."""

    def layer(self, index: int) -> Both:
        """One layer's share."""
        while len(self.layers) <= index:
            self.layers.append(Both())
        return self.layers[index]

    def whole(self) -> Both:
        """Return what whole steps took."""
        found = Both()
        for sums, head_s in zip((found.predicted, found.measured), self.head_s, strict=True):
            sums.steps, sums.terms[HEAD] = self.steps, head_s
        for layer in self.layers:
            found.predicted.add(layer.predicted)
            found.measured.add(layer.measured)
        return found

    @property
    def predicted(self) -> Sums:
        """Of whole steps."""
        return self.whole().predicted

    @property
    def measured(self) -> Sums:
        """Of whole steps."""
        return self.whole().measured

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """Yield each term and lane of whole steps: :meth:`Both.rows`."""
        return self.whole().rows()

    def by_layer(self) -> Iterator[tuple[int, str, float, float]]:
        """Yield the layer before every row of its own."""
        for index, layer in enumerate(self.layers):
            layer.measured.steps = self.steps
            for name, predicted_s, measured_s in layer.rows():
                if name != HEAD:
                    yield index, name, predicted_s, measured_s


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

    Attributes
    ----------
    deciding
        Predicts what deciding takes in a layer of so many tokens that copies so many experts,
        where that was measured.
    joining
        The same of what its experts take beyond their plan, until their sum is there.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.deciding: Callable[[int, int], float] | None = None
        self.joining: Callable[[int], float] = _nothing
        self.phases = {PREFILL: Phase(), DECODE: Phase()}
        self.events: list[Event] = []
        self._usual: dict[bool, float] = {}
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
        """Begin anew with sums and spans: a warm-up is nobody's session."""
        self.restart()
        self.events.clear()
        self._start_s = None
        self._usual.clear()

    def phase(self, prompt: bool) -> Phase:
        """Return the phase of a prompt's steps or of the others."""
        return self.phases[PREFILL if prompt else DECODE]

    def add(self, record: LayerRecord, cost: LayerCost) -> None:
        """Take one layer's record; ``cost`` tells what its experts were predicted to take."""
        phase, plan, work = self.phase(record.prompt), record.decision.plan, record.decision.work
        phase.activated += len(work.loads)
        phase.hits += record.decision.hits
        layer = phase.layer(plan.layer)
        terms, lanes = layer.measured.terms, layer.measured.lanes
        terms[ROUTER] += record.routed_s - record.entered_s
        terms[DECIDING] += record.decided_s - record.routed_s
        terms[EXPERTS] += record.joined_s - record.decided_s
        lanes[CPU] += record.cpu_end_s - record.decided_s if plan.cpu else 0.0
        lanes[JOIN] += record.joined_s - record.cpu_end_s
        terms, lanes = layer.predicted.terms, layer.predicted.lanes
        terms[ROUTER] += record.dense_s
        terms[DECIDING] += self._usually(record)
        joining_s = self.joining(record.tokens)
        terms[EXPERTS] += plan.makespan_s + joining_s
        lanes[CPU] += plan.cpu_end_s if plan.cpu else 0.0
        lanes[JOIN] += plan.makespan_s - (plan.cpu_end_s if plan.cpu else 0.0) + joining_s
        if plan.gpu and record.tokens == 1:
            lanes[GPU] += cost.gpu_start_s + len(plan.gpu) * cost.gpu_s(1)
        elif plan.gpu:
            given = frozenset(plan.gpu)
            loads_s = [cost.gpu_s(load) for expert, load in work.loads if expert in given]
            lanes[GPU] += cost.gpu_start_s + sum(loads_s)
        lanes[LINK] += len(record.copies) * cost.copy_s()
        self._joined_s = record.joined_s
        if self._start_s is None:
            self._start_s = record.entered_s
        self._open.append(record)
        while self._open and self._open[0].done():
            self._close(self._open.popleft())

    def _usually(self, record: LayerRecord) -> float:
        """Predict what deciding takes: what it took lately where it was not measured before.

        The very first layer has nothing to go by then.
        """
        if self.deciding is not None:
            return self.deciding(record.tokens, len(record.decision.plan.copies))
        prompt, took_s = record.prompt, record.decided_s - record.routed_s
        usual_s = self._usual.get(prompt)
        self._usual[prompt] = took_s if usual_s is None else usual_s + RECENT * (took_s - usual_s)
        return usual_s or 0.0

    def step(self, prompt: bool, head_s: float, predicted_head_s: float) -> None:
        """End a step; the time after its last layer was ``head_s``."""
        phase = self.phase(prompt)
        phase.steps += 1
        phase.head_s[0] += predicted_head_s
        phase.head_s[1] += head_s
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
            head.phase.head_s[1] -= waited_s
            if self._keeps():
                begin_s, end_s = head.begin_s + waited_s, head.begin_s + head.seconds
                self._show(GPU, HEAD, begin_s, end_s, head.predicted_s)

    def _close(self, record: LayerRecord) -> None:
        """Add the device's lanes, whose spans are known now, and keep single spans if wanted.

        A device may still compute the layer's experts when the host has gone on to the next
        router, which waits for them: that time is the experts'.
        """
        index = record.decision.plan.layer
        measured = self.phase(record.prompt).layer(index).measured
        began_s = record.entered_s
        if index:
            # The host sees attention begin when it has joined: it does when the device is done.
            waited_s = min(self._late_s, record.routed_s - record.entered_s)
            measured.terms[ROUTER] -= waited_s
            began_s += waited_s
        elif self._layers_closed:
            self._end_step()
        self._layers_closed = True
        plan, keeps, last_s = record.decision.plan, self._keeps(), record.joined_s
        for lane, events in ((GPU, record.computes), (LINK, record.copies)):
            for event in events:
                span = event.span()
                if span is None:
                    continue
                measured.lanes[lane] += span[1] - span[0]
                if lane == GPU:
                    last_s = max(last_s, span[1])
                if keeps:
                    self._show(lane, event.what, *span)
        late_s = last_s - record.joined_s
        measured.terms[EXPERTS] += late_s
        measured.lanes[JOIN] += late_s
        self._late_s = late_s
        if not keeps:
            return
        name = f"layer {index}"
        self._show(GPU, f"{name}: {ROUTER}", began_s, record.routed_s, record.dense_s)
        self._show(CPU, f"{name}: deciding", record.routed_s, record.decided_s)
        if plan.cpu:
            what = f"{name}: experts {', '.join(map(str, plan.cpu))}"
            self._show(CPU, what, record.decided_s, record.cpu_end_s, plan.cpu_end_s)
        if record.joined_s > record.cpu_end_s:
            self._show(CPU, f"{name}: join", record.cpu_end_s, record.joined_s)

    def _keeps(self) -> bool:
        """Whether there is room for more spans, and a wish."""
        return self.keep and len(self.events) < RECORDED_EVENTS

    def _show(
        self, lane: str, what: str, start_s: float, end_s: float, predicted_s: float | None = None
    ) -> None:
        """Keep a span for a trace viewer."""
        zero_s = self._start_s or 0.0
        self.events.append(Event(lane, what, start_s - zero_s, end_s - zero_s, predicted_s))


def _nothing(tokens: int) -> float:
    """What nobody measured."""
    return 0.0
