"""Carries out each layer's plan on the CPU and on a device at once: the one place that sees both.

A layer's step: wait for the router's answer, decide, give the device its copies and experts in the
plan's order and what is worth copying ahead, compute the CPU's experts meanwhile, join. The host
waits twice, for the router and at the join. Whatever the device does wrong, the layer's experts
are computed on the CPU from the same weights, and generation goes on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numba
import numpy as np
from torch import Tensor

from cpu_experts.ffn import run_experts
from gpu_experts.device import Device, Event
from gpu_experts.errors import DeviceError, DeviceMemoryError, GpuExpertsError
from hybrid.choices import F32, Ids, loads_of, replaced
from hybrid.errors import bare, first_line
from hybrid.experts import compute_on_cpu
from hybrid.metrics import SlowPath
from hybrid.partners import Ahead, Launcher, Predictor, Seconds
from hybrid.residents import Opened, PackedLayer, Residents, Settle
from hybrid.timeline import LayerRecord, Timeline
from hybrid.usage import Usage
from planner.director import Decision, Director
from planner.errors import PlannerError

SHRINK = 0.75
"""Share of the slots that is kept when the device's memory runs out."""
TIMEOUT_S = 30.0
"""A copy or a kernel that takes longer is given up: none takes a second."""


class _Given(NamedTuple):
    """What the device was given in a layer's step."""

    out: Tensor
    computes: list[Event]
    copies: list[Event]


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
        self.notes: list[SlowPath] = []
        self._settle = settle
        self._seconds = seconds
        self._threads = threads
        self._lookahead, self._shared = lookahead, shared
        self._read_ahead = read_ahead
        self._timeout_s = timeout_s
        self.residents = Residents(device, layers, self._first_settled(slots))
        self._before_s: float | None = None
        self._prompt = False
        self._turn = threading.Lock()
        self.usage = Usage(len(layers), len(layers[0].blocks), record_routing)
        self._records: deque[LayerRecord] = deque()

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
            self._note(SlowPath(fewer, reason, "give the model less vram"))

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
        self._note_records()
        self.usage.forget()
        self.timeline.finish()
        self.timeline.events.clear()
        self.timeline.restart()

    def begin_step(self, *, prompt: bool, context: int) -> None:
        """Start the clock of a forward pass.

        Parameters
        ----------
        prompt
            Whether it computes several tokens of a sequence.
        context
            Tokens of each sequence after it.
        """
        self._prompt = prompt
        self._seconds.at(context)
        self._before_s = time.perf_counter()

    def end_step(self, predicted_head_s: float) -> None:
        """Stop it, after the output head."""
        self._note_records()
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
            return compute_on_cpu(hidden, expert_ids, routing_weights, packed.blocks, packed.shape)

    def _share(
        self, device: Device, layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """One layer on both devices."""
        entered_s = self._before_s or time.perf_counter()
        packed = self.layers[layer]
        flat = hidden.detach().reshape(-1, packed.shape.hidden)
        tokens = len(flat)
        scores = None
        if self._lookahead is not None and (
            tokens > 1 or self.director.looks_ahead or self._read_ahead is not None
        ):
            scores = self._lookahead.scores(layer, flat)
        answer = device.to_host(
            flat,
            expert_ids.detach(),
            weights.detach(),
            *(() if scores is None else (scores,)),
            meanwhile=lambda: self._shared and self._shared.launch(layer, hidden),
        )
        x = answer[0].float().numpy()
        ids = answer[1].numpy()
        factors = answer[2].float().contiguous().numpy()
        known = None if len(answer) < 4 else answer[3].numpy()
        routed_s = time.perf_counter()
        decision = self._place(layer, ids, factors, tokens, routed_s)
        plan = decision.plan
        given = self._enqueue(device, decision, flat, ids, factors, known)
        decided_s = time.perf_counter()
        cpu_out = None
        if plan.cpu:
            numba.set_num_threads(self._threads)
            cpu_out = np.zeros((tokens, packed.shape.hidden), np.float32)
            here = replaced(ids, {expert: expert for expert in plan.cpu})
            run_experts(x, here, factors, packed.blocks, packed.shape, cpu_out)
        cpu_end_s = time.perf_counter()
        result = device.join(given.out, cpu_out, given.computes, hidden.dtype, self._timeout_s)
        joined_s = time.perf_counter()
        experts = self.director.cost.experts
        self._records.append(
            LayerRecord(
                layer=layer,
                tokens=tokens,
                prompt=self._prompt if self._before_s is not None else tokens > 1,
                plan=plan,
                loads=decision.work.loads,
                hits=decision.hits,
                dense_s=self._seconds.mixer(layer, tokens),
                gpu_work_s=sum(experts.gpu_s(n) for e, n in decision.work.loads if e in plan.gpu),
                copy_s=experts.copy_s(),
                entered_s=entered_s,
                routed_s=routed_s,
                decided_s=decided_s,
                cpu_end_s=cpu_end_s,
                joined_s=joined_s,
                computes=given.computes,
                copies=given.copies,
            )
        )
        self._before_s = joined_s
        return result.view(hidden.shape)

    def _enqueue(
        self,
        device: Device,
        decision: Decision,
        x: Tensor,
        ids: Ids,
        factors: F32,
        scores: F32 | None,
    ) -> _Given:
        """Give the device the layer's work, then what is worth copying for later layers."""
        computes, copies, out = self._launch(device, decision, x, ids, factors)
        self.residents.land()
        ahead = self._predict(decision.work.layer, ids, scores)
        copies += self._fill(decision, ahead, len(x))
        self._note(self.usage.record(decision.work.layer, ids, factors))
        self._note_records()
        return _Given(out, computes, copies)

    def _note_records(self) -> None:
        """Hand what was measured to the timeline, when there is time for it."""
        while self._records:
            record = self._records.popleft()
            self.timeline.add(record)
            self.usage.count(record.layer, record.tokens, record.loads)

    def _place(self, layer: int, ids: Ids, factors: F32, tokens: int, now_s: float) -> Decision:
        """Ask where each expert that the router chose runs."""
        loads, mean = loads_of(ids, factors, len(self.layers[layer].blocks))
        return self.director.place(
            layer,
            loads,
            [expert for expert, _ in loads],
            mean,
            gpu_free_s=self._seconds.shared(layer, tokens),
            link_free_s=self.residents.link_free_s(now_s),
        )

    def _launch(
        self, device: Device, decision: Decision, x: Tensor, ids: Ids, factors: F32
    ) -> tuple[list[Event], list[Event], Tensor]:
        """Give the device the plan's copies and experts, in the plan's order."""
        plan, layer = decision.plan, decision.plan.layer
        kept = {admission.expert: admission for admission in decision.admitted}
        residents = self.residents
        out = device.new_output(len(x))
        computes: list[Event] = []
        landing: dict[int, Event] = {}
        waiting, arrivals = deque(plan.copies), iter(plan.copies)

        def copy_next() -> None:
            expert = waiting.popleft()
            landing[expert] = (
                residents.admit(kept[expert]) if expert in kept else residents.stage(layer, expert)
            )

        def compute(experts: Sequence[int], after: Sequence[Event], what: str) -> None:
            here = replaced(ids, {expert: residents.slot(layer, expert) for expert in experts})
            computes.append(device.compute(x, here, factors, out, after, what))

        if waiting:  # the link starts first; then the GPU has the residents to compute meanwhile
            copy_next()
        for is_copied, run in groupby(plan.gpu, lambda expert: expert in plan.copies):
            if not is_copied:
                here = tuple(run)
                flying = [residents.flying(layer, expert) for expert in here]
                compute(
                    here,
                    [event for event in flying if event is not None],
                    f"layer {layer}: resident experts {', '.join(map(str, here))}",
                )
                continue
            for _ in run:
                # In the order of arrival, whatever the plan's: then at most two are staged.
                expert = next(arrivals)
                if expert not in landing:
                    copy_next()
                compute((expert,), (landing[expert],), f"layer {layer}: copied expert {expert}")
                if expert not in kept:
                    residents.unstage(layer, expert)
        return computes, list(landing.values()), out

    def _fill(self, decision: Decision, ahead: Ahead, tokens: int) -> list[Event]:
        """Use the link's idle time until the next layers' experts start."""
        plan = decision.plan
        busy_s = max(plan.link_end_s, decision.work.link_free_s)
        idle_s = plan.makespan_s + self._seconds.mixer(plan.layer, tokens) - busy_s
        fills = self.director.fill(decision, ahead, [idle_s])
        return [self.residents.admit(fill.admission) for fill in fills]

    def _predict(self, layer: int, ids: Ids, scores: F32 | None) -> Ahead:
        """Compare the router's answer with what was predicted for it; predict later layers."""
        if self._lookahead is None:
            return []
        self._lookahead.learn(layer, ids)
        if scores is None:
            return []
        one, ahead_of = len(ids) == 1, self._lookahead
        ahead = (ahead_of.probabilities if one else ahead_of.expected_loads)(layer, scores)
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
                self._restart()
                break
            except DeviceMemoryError as again:
                error = bare(again)
        if not self.slot_count:
            self._give_up(device, error)
            return
        self._note(
            SlowPath(
                f"{self.slot_count} expert slots instead of {before}",
                f"{device.name} ran out of memory ({first_line(error)})",
                "give the model less vram, or a shorter context, from the start",
            )
        )

    def _give_up(self, device: Device, error: Exception) -> None:
        """Go on without the device."""
        self.device = None
        what = f"all experts on the CPU since {device.name} failed"
        remedy = "load the model again to try the device again"
        self._note(SlowPath(what, first_line(error), remedy))
        try:
            device.close()
        except GpuExpertsError as late:
            reason, remedy = first_line(late), "end this process to free its memory"
            self._note(SlowPath(f"closing {device.name}", reason, remedy))

    def _note(self, note: SlowPath | None) -> None:
        """Keep a note for the report and say it; None is nothing to say."""
        if note is not None:
            self.notes.append(note)
            print(f"hybrid: {note.what}: {note.reason}", file=sys.stderr)

    def _recover(self) -> None:
        """Make sense again after something broke a layer off; forget everything if need be."""
        self._before_s = None
        self._records.clear()
        try:
            if self._shared is not None:
                self._shared.abandon()
            self.residents.recover(self._timeout_s)
        except DeviceError as error:
            if self.device is not None:
                self._give_up(self.device, error)
        except (AssertionError, GpuExpertsError, PlannerError):
            # It was broken off between two halves of a change.
            self._restart()

    def _restart(self) -> None:
        """Begin with nothing resident."""
        assert self.device is not None
        opened = self._settle(self.slot_count)
        self.residents = Residents(self.device, self.layers, opened)
