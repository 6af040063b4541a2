"""Carries out each layer's plan on the CPU and on a device at once: the one place that sees both.

A layer's step: wait for the router's answer, decide, give the device its copies and experts in the
plan's order and what is worth copying ahead, compute the CPU's experts meanwhile, join. The host
waits twice, for the router and at the join: what nobody waits for (notes, learning, copies that
are not urgent) is done while it waits for the next router. Whatever the device does wrong, the
layer's experts are computed on the CPU from the same weights, and generation goes on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from cpu_experts.jit.workers import use_threads
from gpu_experts.checks import as_arrays
from gpu_experts.device import Device, Event
from gpu_experts.errors import DeviceError, DeviceMemoryError, GpuExpertsError
from hybrid.errors import bare, first_line
from hybrid.formats.notes import Note
from hybrid.ledger.timeline import LayerRecord, Timeline
from hybrid.packed.experts import PackedLayer, add_on_cpu, compute_on_cpu
from hybrid.sharing.device_slots import Opened, Residents, Settle
from hybrid.sharing.launches import Call, calls_of
from hybrid.sharing.partners import Ahead, Launcher, Predictor, Seconds
from hybrid.sharing.routed import F32, Choice, Ids
from hybrid.sharing.usage import Usage
from planner.decide.director import Decision, Director
from planner.errors import PlannerError

SHRINK = 0.75
"""Share of the slots that is kept when the device's memory runs out."""
TIMEOUT_S = 30.0
"""A copy or a kernel that takes longer is given up: none takes a second."""


class _Step:
    """A layer's step: its input ``[T, D]``, where outputs go, and what the device was given."""

    __slots__ = (
        *("device", "layer", "x", "tokens", "out", "cpu_out", "mixer_s", "shared_s"),
        *("computes", "copies"),
    )
    out: Tensor
    cpu_out: F32
    mixer_s: float
    shared_s: float

    def __init__(self, device: Device, layer: int, x: Tensor) -> None:
        self.device, self.layer, self.x, self.tokens = device, layer, x, len(x)
        self.computes: list[Event] = []
        self.copies: list[Event] = []


class Executor:
    """Runs the routed experts of all layers of one model.

    Parameters
    ----------
    layers
        Every MoE layer's experts.
    device
        Where experts are copied to.
    settle
        Opens the device for a number of slots and returns what is resident then: nothing.
    slots
        How many to begin with.
    seconds
        Predictions for what is not a routed expert.
    threads
        Of the CPU's kernels.
    lookahead, shared
        What predicts later layers, and what launches shared experts early; None for neither.
    read_ahead
        Told a layer and its likely experts when the store does not fit into memory.
    timeline
        Collects what happened.
    record_routing
        Whether to keep what the routers choose.
    timeout_s
        How long to wait for the device.

    Attributes
    ----------
    device
        None when it was given up: everything runs on the CPU then.
    notes
        What did not go as planned, for the report.
    usage
        Which experts were used.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        device: Device,
        settle: Settle,
        slots: int,
        seconds: Seconds,
        *,
        threads: int,
        lookahead: Predictor | None = None,
        shared: Launcher | None = None,
        read_ahead: Callable[[int, Sequence[int]], None] | None = None,
        timeline: Timeline | None = None,
        record_routing: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.layers = layers
        self.device: Device | None = device
        self.slot_count = slots
        self.timeline = timeline or Timeline()
        self.notes: list[Note] = []
        self._settle = settle
        self._seconds = seconds
        self._threads = threads
        self._lookahead, self._shared = lookahead, shared
        self._read_ahead = read_ahead
        self._timeout_s = timeout_s
        self.residents = Residents(device, layers, self._first_settled(slots))
        if lookahead is not None and read_ahead is None:
            lookahead.limit(self.director.reach)
        self._before_s: float | None = None
        self._prompt = False
        self._turn = threading.Lock()
        self.usage = Usage(len(layers), len(layers[0].blocks), record_routing)
        self._unnoted: deque[tuple[LayerRecord, Ids, F32]] = deque()

    @property
    def director(self) -> Director:
        """Who decides."""
        return self.residents.director

    def _first_settled(self, slots: int) -> Opened:
        """Open the device for ``slots`` slots, or for as many as its memory really has room for."""
        while True:
            try:
                return self._settle(self.slot_count)
            except DeviceMemoryError as raised:
                error = bare(raised)
            if not self.slot_count:
                raise error
            self.slot_count = int(self.slot_count * SHRINK)
            fewer = f"{self.slot_count} expert slots instead of {slots}"
            reason = f"the device has less memory than was planned with ({first_line(error)})"
            self._note(Note(fewer, reason, "give the model less vram"))

    def warm(self) -> None:
        """Fill free slots with whom the cache's policy values most."""
        if self.device is None:
            return
        try:
            self.residents.warm(self._timeout_s)
            return
        except GpuExpertsError as raised:
            error = bare(raised)
        self._give_up(self.device, error)

    def close(self) -> None:
        """Give the device's memory back; everything runs on the CPU from now on."""
        if self.device is not None:
            device, self.device = self.device, None
            device.close()

    def forget_counts(self) -> None:
        """Begin anew with what is counted, recorded and timed: a warm-up is nobody's session."""
        self._catch_up()
        self.usage.forget()
        self.timeline.forget()

    def begin_step(self, *, prompt: bool, context: int, sequences: int = 1) -> None:
        """Start the clock of a forward pass.

        Parameters
        ----------
        prompt
            Whether it computes several tokens of a sequence.
        context, sequences
            Tokens of each sequence after it, and how many sequences there are.
        """
        self._prompt = prompt
        self._seconds.at(context, sequences)
        use_threads(self._threads)
        self._before_s = time.perf_counter() if self.device is not None else None

    def end_step(self, predicted_head_s: float) -> None:
        """Stop it, after the output head."""
        self._catch_up()
        if self._before_s is not None:
            self.timeline.step(self._prompt, time.perf_counter() - self._before_s, predicted_head_s)
        self._before_s = None

    def run_layer(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Parameters
        ----------
        layer
            Index among the model's MoE layers.
        hidden
            ``[..., D]`` in the model's dtype, where the device keeps hidden states.
        expert_ids, routing_weights
            ``[T, A]``; ids of E and above contribute nothing.
        """
        with self._turn:
            if self.device is not None:
                try:
                    return self._share(self.device, layer, hidden, expert_ids, routing_weights)
                except (GpuExpertsError, PlannerError) as raised:
                    error = bare(raised)
                except BaseException:
                    self._recover()
                    raise
                # Not inside the handler: what the error's frames held is free by now.
                if isinstance(error, DeviceMemoryError):
                    self.shrink(error)
                else:
                    self._give_up(self.device, error)
            packed = self.layers[layer]
            self._note(self.usage.of_cpu(layer, expert_ids, routing_weights))
            return compute_on_cpu(hidden, expert_ids, routing_weights, packed)

    def _share(
        self, device: Device, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """One layer on both devices."""
        entered_s = self._before_s or time.perf_counter()
        packed = self.layers[layer]
        step = _Step(device, layer, hidden.detach().reshape(-1, packed.shape.hidden))
        scores = None
        if self._lookahead is not None and (
            step.tokens > 1 or self.director.looks_ahead or self._read_ahead is not None
        ):
            scores = self._lookahead.scores(layer, step.x)
        x, ids, factors, *known = device.to_host(
            *(step.x, expert_ids, weights),
            *(() if scores is None else (scores,)),
            meanwhile=lambda: self._prepare(step, hidden),
        )
        routed_s = time.perf_counter()
        choice = Choice(ids, factors, len(packed.blocks))
        decision = self._place(step, choice, routed_s)
        plan = decision.plan
        self._launch(step, choice, decision)
        # What the link gets beyond the plan is decided after the CPU's experts, unless the link
        # would idle by then.
        at_once = not plan.cpu or plan.link_end_s < plan.cpu_end_s
        if at_once:
            self._fill(step, decision, routed_s, known)
        decided_s = time.perf_counter()
        if plan.cpu:
            own_ids, own_factors = as_arrays(*choice.among(plan.cpu, plan.cpu))
            add_on_cpu(x, own_ids, own_factors, packed, step.cpu_out)
        cpu_end_s = time.perf_counter()
        if not at_once:
            self._fill(step, decision, routed_s, known)
        result = device.join(
            step.out,
            step.cpu_out if plan.cpu else None,
            step.computes,
            hidden.dtype,
            self._timeout_s,
        )
        joined_s = time.perf_counter()
        record = LayerRecord(
            step.tokens,
            self._prompt if self._before_s is not None else step.tokens > 1,
            decision,
            step.mixer_s,
            *(entered_s, routed_s, decided_s, cpu_end_s, joined_s),
            step.computes,
            step.copies,
        )
        self._unnoted.append((record, ids.copy(), factors.copy()))
        del step.x, step.out, step.cpu_out
        self._before_s = joined_s
        return result if hidden.ndim == 2 else result.view(hidden.shape)

    def _prepare(self, step: _Step, hidden: Tensor) -> None:
        """Do what does not depend on the router's answer while the host waits for it."""
        if self._shared is not None:
            self._shared.launch(step.layer, hidden)
        step.out = step.device.new_output(step.tokens)
        step.cpu_out = np.zeros(step.x.shape, np.float32)
        step.mixer_s = self._seconds.mixer(step.layer, step.tokens)
        step.shared_s = self._seconds.shared(step.layer, step.tokens)
        self.residents.land()
        self._catch_up()

    def _catch_up(self) -> None:
        """Note and learn what the layer before did, which others need not wait for."""
        while self._unnoted:
            record, ids, factors = self._unnoted.popleft()
            work = record.decision.work
            self.timeline.add(record, self.director.cost)
            self.usage.count(work.layer, record.tokens, work.loads)
            self._note(self.usage.record(work.layer, ids, factors))
            if self._lookahead is not None:
                self._lookahead.learn(work.layer, ids)
        self.director.cache.learn()

    def _place(self, step: _Step, choice: Choice, now_s: float) -> Decision:
        """Ask where each expert that the router chose runs."""
        return self.director.place(
            step.layer,
            choice.loads,
            choice.activated,
            choice.weights,
            gpu_free_s=step.shared_s,
            link_free_s=self.residents.link_free_s(now_s),
        )

    def _launch(self, step: _Step, choice: Choice, decision: Decision) -> None:
        """Give the device the plan's copies and experts.

        A single token's are computed in one call where the CPU takes longer even so.
        """
        work, plan, residents = decision.work, decision.plan, self.residents
        kept = {admission.expert: admission for admission in decision.admitted}
        staged = set(plan.copies) - kept.keys()
        if not plan.gpu:
            return
        if not plan.copies or (step.tokens == 1 and self._can_wait(decision)):
            calls = [Call(plan.copies, plan.gpu)]
        else:
            cost = self.director.cost.experts
            calls = calls_of(work, plan, cost, step.tokens, kept, residents.staging)
        for copies, experts in calls:
            for expert in copies:
                if expert in staged:
                    step.copies.append(residents.stage(step.layer, expert))
                else:
                    step.copies.append(residents.admit(kept[expert]))
            if experts:
                self._compute(step, choice, experts)
            for expert in staged.intersection(experts):
                residents.unstage(step.layer, expert)

    def _can_wait(self, decision: Decision) -> bool:
        """Whether the GPU may begin after the last copy and still be done before the CPU."""
        plan = decision.plan
        staged = len(plan.copies) - len(decision.admitted)
        if not plan.copies or staged > self.residents.free_staging:
            return False
        cost = self.director.cost.experts
        begin_s = max(plan.link_end_s, decision.work.gpu_free_s + cost.gpu_start_s)
        return begin_s + len(plan.gpu) * cost.gpu_s(1) <= plan.cpu_end_s

    def _compute(self, step: _Step, choice: Choice, experts: Sequence[int]) -> None:
        """Give the device experts to compute, once their copies have arrived."""
        ids, factors = choice.among(experts, self.residents.slots(step.layer, experts))
        what = f"layer {step.layer}: experts {', '.join(map(str, experts))}"
        step.computes.append(step.device.compute(step.x, ids, factors, step.out, (), what))

    def _fill(self, step: _Step, decision: Decision, routed_s: float, known: Sequence[F32]) -> None:
        """Use the link's idle time until the next layers' experts start."""
        ahead = self._predict(step, known[0]) if known else ()
        plan, now_s = decision.plan, time.perf_counter() - routed_s
        busy_s = max(plan.link_end_s, decision.work.link_free_s, now_s)
        idle_s = max(plan.makespan_s, now_s) + step.mixer_s - busy_s
        for fill in self.director.fill(decision, ahead, [idle_s]):
            step.copies.append(self.residents.admit(fill.admission))

    def _predict(self, step: _Step, scores: F32) -> Ahead:
        """Tell which experts the next layers will likely use."""
        assert self._lookahead is not None
        if step.tokens == 1:
            ahead = self._lookahead.probabilities(step.layer, scores)
        else:
            ahead = self._lookahead.expected_loads(step.layer, scores)
        if self._read_ahead is not None:
            for following, expected in ahead:
                self._read_ahead(following, np.flatnonzero(expected > 0.5).tolist())
        return ahead

    def shrink(self, error: Exception) -> None:
        """Go on with fewer slots after the device's memory ran out; with none, without it."""
        device = self.device
        if device is None:
            return
        before = self.slot_count
        while self.slot_count:
            self.slot_count = int(self.slot_count * SHRINK)
            try:
                self.restart()
                break
            except DeviceMemoryError as again:
                error = bare(again)
        if not self.slot_count:
            self._give_up(device, error)
            return
        self._note(
            Note(
                f"{self.slot_count} expert slots instead of {before}",
                f"{device.name} ran out of memory ({first_line(error)})",
                "give the model less vram, or a shorter context, from the start",
            )
        )

    def _give_up(self, device: Device, error: Exception) -> None:
        """Go on without the device; this step and those to come are timed no more."""
        self.device = self._before_s = None
        what = f"all experts on the CPU since {device.name} failed"
        remedy = "load the model again to try the device again"
        self._note(Note(what, first_line(error), remedy))
        try:
            device.close()
        except GpuExpertsError as late:
            reason, remedy = first_line(late), "end this process to free its memory"
            self._note(Note(f"closing {device.name}", reason, remedy))

    def _note(self, note: Note | None) -> None:
        """Keep a note for the report and say it; None is nothing to say."""
        if note is not None:
            self.notes.append(note)
            print(f"hybrid: {note.what}: {note.reason}", file=sys.stderr)

    def _recover(self) -> None:
        """Make sense again after something broke a layer off; forget everything if need be."""
        self._before_s = None
        self._unnoted.clear()
        try:
            if self._shared is not None:
                self._shared.abandon()
            self.residents.recover(self._timeout_s)
        except DeviceError as error:
            if self.device is not None:
                self._give_up(self.device, error)
        except (AssertionError, GpuExpertsError, PlannerError):
            # It was broken off between two halves of a change.
            self.restart()

    def restart(self) -> None:
        """Begin with nothing resident, between two layers; what was learned about experts stays."""
        assert self.device is not None
        opened = self._settle(self.slot_count)
        self.residents = Residents(self.device, self.layers, opened)
