"""Carries out each layer's plan on the CPU and on a device at once: the one place that sees both.

A layer's step has four phases:

- *route*: wait for the router's answer. Meanwhile prepare what does not depend on it, and *settle*
  the layer before: what nobody waits for (notes, learning) is done then;
- *decide*: ask the director where each expert runs;
- *launch*: give the device its copies and experts in the plan's order, and what is worth copying
  ahead;
- *join*: compute the CPU's experts while the device computes its own, and add the two up.

Whatever the device does wrong, the layer's experts are computed on the CPU from the same weights,
and generation goes on (:mod:`hybrid.sharing.device_guard`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from cpu_experts.jit.turns import Turn
from cpu_experts.jit.workers import use_threads
from gpu_experts.checks import as_arrays
from gpu_experts.device import Device, Event
from gpu_experts.errors import GpuExpertsError
from hybrid.errors import bare
from hybrid.ledger.timeline import LayerRecord, Timeline
from hybrid.packed.experts import PackedLayer, add_on_cpu, compute_on_cpu
from hybrid.sharing.books import Books
from hybrid.sharing.device_guard import DeviceGuard
from hybrid.sharing.device_slots import Residents
from hybrid.sharing.launches import launches_of
from hybrid.sharing.notes import Notes
from hybrid.sharing.partners import Ahead, Launcher, Predictor, Seconds
from hybrid.sharing.routed import F32, Ids, RoutedTokens
from hybrid.sharing.usage import Usage
from planner.decide.director import Decision, Director
from planner.errors import PlannerError


class _Step:
    """A layer's step; each phase adds what the next ones need."""

    __slots__ = (
        *("device", "residents", "layer", "packed", "hidden", "x", "tokens", "entered_s"),
        *("out", "cpu_out", "mixer_s", "shared_s"),
        *("cpu_x", "ids", "factors", "scores", "routed_s"),
        *("routed", "decision", "computes", "copies", "fills_late", "decided_s"),
    )
    # Prepared while the host waits for the router: where outputs go, and what is predicted.
    out: Tensor
    cpu_out: F32
    mixer_s: float
    shared_s: float
    # Its answer: hidden states and choice on the host, and what the lookahead scored.
    cpu_x: F32
    ids: Ids
    factors: F32
    scores: Sequence[F32]
    routed_s: float
    # Where the experts run.
    routed: RoutedTokens
    decision: Decision
    fills_late: bool
    decided_s: float

    def __init__(
        self,
        device: Device,
        residents: Residents,
        layer: int,
        packed: PackedLayer,
        hidden: Tensor,
        entered_s: float,
    ) -> None:
        self.device, self.residents = device, residents
        self.layer, self.packed, self.hidden = layer, packed, hidden
        self.x = hidden.detach().reshape(-1, packed.shape.hidden)
        self.tokens, self.entered_s = len(self.x), entered_s
        self.computes: list[Event] = []
        self.copies: list[Event] = []


class Executor:
    """Runs the routed experts of all layers of one model.

    Parameters
    ----------
    guard
        The device that some of them run on.
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

    Attributes
    ----------
    layers
        Every MoE layer's experts.
    usage
        Which experts were used.
    """

    def __init__(
        self,
        guard: DeviceGuard,
        seconds: Seconds,
        *,
        threads: int,
        lookahead: Predictor | None = None,
        shared: Launcher | None = None,
        read_ahead: Callable[[int, Sequence[int]], None] | None = None,
        timeline: Timeline | None = None,
        record_routing: bool = False,
    ) -> None:
        self.guard = guard
        self.layers = layers = guard.layers
        self.timeline = timeline or Timeline()
        self.usage = Usage(len(layers), len(layers[0].blocks), record_routing)
        self._books = Books(self.timeline, self.usage, lookahead, guard.notes)
        self._seconds = seconds
        self._threads = threads
        self._lookahead, self._shared = lookahead, shared
        self._read_ahead = read_ahead
        if lookahead is not None and read_ahead is None:
            lookahead.limit(self.director.reach)
        self._turn = Turn()

    @property
    def device(self) -> Device | None:
        """None when it was given up: everything runs on the CPU then."""
        return self.guard.device

    @property
    def residents(self) -> Residents:
        """What is on the device."""
        return self.guard.residents

    @property
    def director(self) -> Director:
        """Who decides."""
        return self.guard.residents.director

    @property
    def slot_count(self) -> int:
        """How many experts can be resident."""
        return self.guard.slot_count

    @property
    def notes(self) -> Notes:
        """What did not go as planned, for the report."""
        return self.guard.notes

    def close(self) -> None:
        """Give the device's memory back; everything runs on the CPU from now on."""
        self.guard.close()

    def forget_counts(self) -> None:
        """Begin anew with what is counted, recorded and timed: a warm-up is nobody's session."""
        self._books.settle(self.director)
        self._books.forget()

    def begin_step(self, *, prompt: bool, context: int, sequences: int = 1) -> None:
        """Start the clock of a forward pass.

        Parameters
        ----------
        prompt
            Whether it computes several tokens of a sequence.
        context, sequences
            Tokens of each sequence after it, and how many sequences there are.
        """
        self._seconds.at(context, sequences)
        use_threads(self._threads)
        self._books.begin_step(prompt, timed=self.guard.device is not None)

    def end_step(self, predicted_head_s: float) -> None:
        """Stop it, after the output head."""
        self._books.settle(self.director)
        self._books.end_step(predicted_head_s)

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
            device = self.guard.device
            if device is not None:
                try:
                    return self._share(device, layer, hidden, expert_ids, routing_weights)
                except (GpuExpertsError, PlannerError) as raised:
                    error = bare(raised)
                except BaseException:
                    self._recover()
                    raise
                # Not inside the handler: what the error's frames held is free by now.
                self._answer(error)
            self.notes.say(self.usage.of_cpu(layer, expert_ids, routing_weights))
            return compute_on_cpu(hidden, expert_ids, routing_weights, self.layers[layer])

    def _share(
        self, device: Device, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """One layer on both devices."""
        step = self._route(device, layer, hidden, expert_ids, weights)
        self._decide(step)
        self._launch(step)
        return self._join(step)

    # --- route

    def _route(
        self, device: Device, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> _Step:
        """Wait for the router's answer, and do meanwhile what does not depend on it."""
        entered_s = self._books.before_s or time.perf_counter()
        step = _Step(device, self.guard.residents, layer, self.layers[layer], hidden, entered_s)
        asked = (step.x, expert_ids, weights, *self._score(step))
        step.cpu_x, step.ids, step.factors, *step.scores = device.to_host(
            *asked, meanwhile=lambda: self._while_routing(step)
        )
        step.routed_s = time.perf_counter()
        return step

    def _score(self, step: _Step) -> tuple[Tensor, ...]:
        """What the lookahead is to know of the later layers, on the device, where it is asked."""
        if self._lookahead is None or not (
            step.tokens > 1 or step.residents.director.looks_ahead or self._read_ahead is not None
        ):
            return ()
        scores = self._lookahead.scores(step.layer, step.x)
        return () if scores is None else (scores,)

    def _while_routing(self, step: _Step) -> None:
        """Prepare this layer, and settle the one before."""
        if self._shared is not None:
            self._shared.launch(step.layer, step.hidden)
        step.out = step.device.new_output(step.tokens)
        step.cpu_out = np.zeros(step.x.shape, np.float32)
        step.mixer_s = self._seconds.mixer(step.layer, step.tokens)
        step.shared_s = self._seconds.shared(step.layer, step.tokens)
        step.residents.land()
        self._books.settle(step.residents.director)

    # --- decide

    def _decide(self, step: _Step) -> None:
        """Ask where each expert that the router chose runs."""
        step.routed = routed = RoutedTokens(step.ids, step.factors, len(step.packed.blocks))
        step.decision = step.residents.director.place(
            step.layer,
            routed.loads,
            routed.activated,
            routed.weights,
            gpu_free_s=step.shared_s,
            link_free_s=step.residents.link_free_s(step.routed_s),
        )

    # --- launch

    def _launch(self, step: _Step) -> None:
        """Give the device the plan's copies and experts, and the link what is worth it beyond.

        The latter is decided after the CPU's experts, unless the link would idle by then.
        """
        plan = step.decision.plan
        if plan.gpu:
            self._hand_over(step)
        step.fills_late = bool(plan.cpu) and plan.link_end_s >= plan.cpu_end_s
        if not step.fills_late:
            self._fill(step)
        step.decided_s = time.perf_counter()

    def _hand_over(self, step: _Step) -> None:
        """Enqueue the plan's copies and computes."""
        decision, residents, copies = step.decision, step.residents, step.copies
        kept = {admission.expert: admission for admission in decision.admitted}
        staged = set(decision.plan.copies) - kept.keys()
        cost = residents.director.cost.experts
        for launch in launches_of(decision, cost, step.tokens, kept, residents.free_staging):
            for expert in launch.copies:
                if expert in staged:
                    copies.append(residents.stage(step.layer, expert))
                else:
                    copies.append(residents.admit(kept[expert]))
            if launch.experts:
                self._compute(step, launch.experts)
            for expert in staged.intersection(launch.experts):
                residents.unstage(step.layer, expert)

    def _compute(self, step: _Step, experts: Sequence[int]) -> None:
        """Give the device experts to compute, once their copies have arrived."""
        ids, factors = step.routed.among(experts, step.residents.slots(step.layer, experts))
        what = f"layer {step.layer}: experts {', '.join(map(str, experts))}"
        step.computes.append(step.device.compute(step.x, ids, factors, step.out, (), what))

    def _fill(self, step: _Step) -> None:
        """Use the link's idle time until the next layers' experts start."""
        ahead = self._predict(step, step.scores[0]) if step.scores else ()
        decision, plan = step.decision, step.decision.plan
        now_s = time.perf_counter() - step.routed_s
        busy_s = max(plan.link_end_s, decision.work.link_free_s, now_s)
        idle_s = max(plan.makespan_s, now_s) + step.mixer_s - busy_s
        for fill in step.residents.director.fill(decision, ahead, [idle_s]):
            step.copies.append(step.residents.admit(fill.admission))

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

    # --- join

    def _join(self, step: _Step) -> Tensor:
        """Compute the CPU's experts, wait for the device's, and return the sum."""
        on_cpu, hidden = step.decision.plan.cpu, step.hidden
        if on_cpu:
            ids, factors = as_arrays(*step.routed.among(on_cpu, on_cpu))
            add_on_cpu(step.cpu_x, ids, factors, step.packed, step.cpu_out)
        cpu_end_s = time.perf_counter()
        if step.fills_late:
            self._fill(step)
        result = step.device.join(
            step.out,
            step.cpu_out if on_cpu else None,
            step.computes,
            hidden.dtype,
            self.guard.timeout_s,
        )
        joined_s = time.perf_counter()
        record = LayerRecord(
            step.tokens,
            self._books.is_prompt(step.tokens),
            step.decision,
            step.mixer_s,
            *(step.entered_s, step.routed_s, step.decided_s, cpu_end_s, joined_s),
            step.computes,
            step.copies,
        )
        self._books.enter(record, step.ids, step.factors)
        return result if hidden.ndim == 2 else result.view(hidden.shape)

    # --- when it goes wrong

    def _answer(self, error: Exception) -> None:
        """Let the device go on with less, or without it; a pass without it is timed no more."""
        self.guard.answer(error)
        if self.guard.device is None:
            self._books.stop()

    def _recover(self) -> None:
        """Make sense again after something broke a layer off."""
        self._books.break_off()
        if self._shared is not None:
            self._shared.abandon()
        self.guard.recover()
