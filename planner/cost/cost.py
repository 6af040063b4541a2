"""How long things take: experts on either side, copies, and everything else in a layer.

An expert reads its weights once and computes ``2 * params`` operations per token, so it takes

    max(bytes / memory rate, load * 2 * params / compute rate)

on either side: a floor while memory binds, a slope once compute does (the roofline of MoE-Lens,
arXiv 2504.09345). A CPU call adds a start cost once per layer, the GPU the launch of its first
call; a copy adds a latency. Calibration points, where the hardware description has them for this
shape and format, replace the formula by interpolation over the load. So they do for attention,
dense layers, the head and what surrounds them, of a model whose family was calibrated where its
dense weights are: on the CPU alone, or on the GPU.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

from hybrid.formats.registry import weight_bytes
from planner.cost.term_points import MeasuredTerms, pieces
from planner.describe.estimate import Estimate, Source, weakest
from planner.describe.hardware import HardwareSpec, Point, Quantity
from planner.describe.model import Layer, ModelSpec
from planner.describe.terms import CALL, CPU, DECIDING, DENSE, HANDING, HEAD, JOINING, MIXER
from planner.errors import CostError

_KEPT = 1 << 14
"""Durations of attention that are kept."""


class ExpertCost:
    """Durations of one layer's routed experts, as the scheduler asks for them.

    Every MoE layer of a model has experts of one shape, so one object serves all layers.
    Durations are kept per load: a run asks for few distinct loads, very often.

    Raises
    ------
    CostError
        When the machine has neither rates nor calibration points for a lane that is asked for.
    """

    def __init__(self, model: ModelSpec, hardware: HardwareSpec, fmt: str) -> None:
        experts = model.experts
        self.bytes = weight_bytes(experts.params_each, fmt)
        self.flop_per_token = 2 * experts.params_each
        self._hardware = hardware
        self._points = {
            lane: sorted(
                (
                    p
                    for p in hardware.points
                    if (p.lane, p.hidden, p.intermediate, p.format)
                    == (lane, experts.hidden, experts.intermediate, fmt)
                ),
                key=lambda p: p.load,
            )
            for lane in ("cpu", "gpu", "copy")
        }
        self._cpu: dict[int, float] = {}
        self._gpu: dict[int, float] = {}
        self.cpu_start_s = hardware.cpu.start_s.value
        self.gpu_start_s = hardware.gpu.launch_s.value if hardware.gpu else 0.0
        self._top_k, self._count = experts.top_k, experts.count
        # Without a GPU a single token's layers are one compiled call, and experts a part of it.
        found = (
            None
            if hardware.gpu
            else MeasuredTerms(hardware.terms, model.family).decode(
                CPU, "", experts.params_each, fmt, 1
            )
        )
        self._compiled = found
        self._copy_s = self.copy_estimate().value if hardware.link else None

    def cpu_s(self, load: int) -> float:
        """Time one expert with ``load`` tokens adds to the CPU lane."""
        found = self._cpu.get(load)
        if found is None:
            found = self._cpu[load] = self.cpu_estimate(load).value
        return found

    def gpu_s(self, load: int) -> float:
        """Time one expert with ``load`` tokens adds to the GPU lane."""
        found = self._gpu.get(load)
        if found is None:
            found = self._gpu[load] = self.gpu_estimate(load).value
        return found

    def copy_s(self) -> float:
        """Time to bring one expert over the link."""
        return self.copy_estimate().value if self._copy_s is None else self._copy_s

    def cpu_set_s(self, loads: Sequence[int]) -> float:
        """Time of one CPU call that computes a set of experts; 0 for none."""
        if self._compiled is not None and sum(loads) <= self._top_k:
            return self._compiled.value * len(loads)
        return self.cpu_start_s + sum(map(self.cpu_s, loads)) if loads else 0.0

    def cpu_call_estimate(self, tokens: int) -> Estimate:
        """``cpu_set_s`` of the experts of so many tokens, evenly loaded, with source and error.

        A start whose error nobody knows counts as exact.
        """
        pairs = tokens * self._top_k
        if self._compiled is not None and pairs <= self._top_k:
            return self._compiled * pairs
        used = min(pairs, self._count)
        start, experts = (
            constant(self._hardware.cpu.start_s),
            self.cpu_estimate(round(pairs / used)),
        )
        return Estimate(start.value, start.source, start.error or 0.0) + experts * used

    def cpu_estimate(self, load: int) -> Estimate:
        """``cpu_s`` with its source and error."""
        if (found := self._calibrated("cpu", load)) is not None:
            return found
        cpu = self._hardware.cpu
        memory = rate_time(self.bytes, cpu.memory_bytes_per_s, cpu.memory_efficiency)
        compute = rate_time(load * self.flop_per_token, cpu.flop_per_s, cpu.flop_efficiency)
        return larger(memory, compute)

    def gpu_estimate(self, load: int) -> Estimate:
        """``gpu_s`` with its source and error."""
        if (found := self._calibrated("gpu", load)) is not None:
            return found
        gpu = self._hardware.gpu
        if gpu is None:
            raise self._missing("gpu")
        memory = rate_time(self.bytes, gpu.memory_bytes_per_s, gpu.memory_efficiency)
        compute = rate_time(load * self.flop_per_token, gpu.flop_per_s, gpu.flop_efficiency)
        return larger(memory, compute)

    def copy_estimate(self) -> Estimate:
        """``copy_s`` with its source and error."""
        if self._points["copy"]:
            point = self._points["copy"][0]
            return interpolate([point], point.load)
        link = self._hardware.link
        if link is None:
            raise self._missing("copy")
        return rate_time(self.bytes, link.bytes_per_s) + constant(link.latency_s)

    def _calibrated(self, lane: str, load: int) -> Estimate | None:
        """What was measured; None where nothing was, or one load only, and less than this."""
        points = self._points[lane]
        if not points or (len(points) == 1 and load > points[0].load):
            return None
        return interpolate(points, load)

    def _missing(self, lane: str) -> CostError:
        return CostError(
            f"{self._hardware.name} gives neither rates nor calibration points for lane {lane!r}",
            hint="choose hardware with a GPU and a link, or calibrate this machine",
        )


class CostModel:
    """Durations of everything a step does on one machine.

    Parameters
    ----------
    model, hardware
        What runs, and where.
    expert_format, dense_format
        Weight formats (:mod:`hybrid.formats.registry`).
    kv_bytes
        Bytes of one cached number.
    dense_bytes
        Of all dense weights, where several formats make them up; ``dense_format`` tells by default.
    """

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        expert_format: str = "q4_0",
        dense_format: str = "bf16",
        kv_bytes: int = 2,
        dense_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.hardware = hardware
        self.expert_format = expert_format
        self.dense_format = dense_format
        self.kv_bytes = kv_bytes
        told = weight_bytes(model.dense_params, dense_format)
        self.dense_bytes = told if dense_bytes is None else dense_bytes
        self._share = self.dense_bytes / told
        self.experts = ExpertCost(model, hardware, expert_format)
        self._measured = MeasuredTerms(
            hardware.terms, model.family, "gpu" if hardware.gpu else "cpu"
        )
        self._deciding: dict[tuple[int, int], Estimate] = {}
        self._joining: dict[int, Estimate] = {}
        self._host_s: dict[tuple[int, int], tuple[float, float]] = {}
        self._ffns: dict[tuple[int, int], Estimate] = {}
        self._mixers: dict[tuple[Layer, int, int, int], Estimate] = {}
        self.cpu_slowdown = hardware.link.cpu_slowdown.value if hardware.link else 1.0
        """How many times longer the CPU's experts take while copies read the same memory."""

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
        """The kinds of decoder layers, and of which kind each layer is."""
        kinds = tuple(dict.fromkeys(self.model.layers))
        return kinds, tuple(kinds.index(layer) for layer in self.model.layers)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether attention and dense weights run on a GPU."""
        return self.hardware.gpu is not None

    def mixer(self, layer: Layer, tokens: int, context: int, sequences: int = 1) -> Estimate:
        """Time from a layer's input to its router's answer.

        On a GPU the host prepares launches while the device computes, so the slower of the two
        counts; on the CPU they add up, unless a calibration measured the whole.

        Parameters
        ----------
        layer
            Which layer.
        tokens
            Tokens computed in this step, over all sequences.
        context
            Tokens in the cache of each sequence after the step.
        sequences
            How many sequences the tokens belong to.
        """
        key = (layer, tokens, context, sequences)
        if key not in self._mixers:
            if len(self._mixers) >= _KEPT:  # a session's contexts are without end
                self._mixers.clear()
            mixer = layer.mixer
            found = None
            if sequences == 1:
                found = self._calibrated(MIXER, mixer.params, tokens, context, mixer.kind)
            if found is not None:
                self._mixers[key] = found
                return found
            # The tokens of a prompt see half of it on average.
            seen = mixer.visible(max(1, context - tokens // sequences // 2))
            flop = (2 * mixer.params + mixer.score_flops * seen) * tokens
            read = mixer.cached(context) * self.kv_bytes * sequences
            work = self.dense(mixer.params, tokens, extra_bytes=read, flop=flop)
            cpu = self.hardware.cpu
            prompt = tokens > sequences and cpu.prompt_layer_overhead_s
            host = constant(prompt or cpu.layer_overhead_s)
            self._mixers[key] = larger(work, host) if self.on_gpu else work + host
        return self._mixers[key]

    def ffn(self, layer: Layer, tokens: int) -> Estimate:
        """Time of a layer's dense or shared feed-forward."""
        key = (layer.ffn_params, tokens)
        if key not in self._ffns:
            found = self._calibrated(DENSE, layer.ffn_params, tokens, tokens)
            self._ffns[key] = self.dense(*key) if found is None else found
        return self._ffns[key]

    def deciding(self, tokens: int, copies: int = 0) -> Estimate:
        """Time of the host in a layer, from the router's answer until the GPU has its work.

        ``copies`` experts are copied to it. Unless a calibration measured this model, what the
        machine's description says of any; 0 without a GPU.
        """
        key = (tokens, copies)
        if key not in self._deciding:
            params, fmt = self.model.experts.params_each, self.expert_format
            found, each = (
                self._calibrated(term, params, tokens, tokens, fmt=fmt) if self.on_gpu else None
                for term in (DECIDING, HANDING)
            )
            known = self.hardware.cpu.deciding_s
            if found is not None and each is not None:
                found += each * copies
            elif known is not None and self.on_gpu:
                found = constant(known) * self._activated(tokens)
            self._deciding[key] = Estimate(0.0, Source.ASSUMED) if found is None else found
        return self._deciding[key]

    def _activated(self, tokens: int) -> float:
        """Experts that so many tokens activate in a layer where all are equally likely."""
        experts = self.model.experts
        return experts.count * (1 - (1 - experts.top_k / experts.count) ** tokens)

    def joining(self, tokens: int) -> Estimate:
        """Time of a layer's experts beyond their plan, until their sum is there.

        What both sides wait for each other and for memory that copies use, too, and calls of the
        GPU after the first. 0 unless measured, and without a GPU.
        """
        if tokens not in self._joining:
            found = None
            if self.on_gpu:
                params, fmt = self.model.experts.params_each, self.expert_format
                found = self._calibrated(JOINING, params, tokens, tokens, fmt=fmt)
            self._joining[tokens] = Estimate(0.0, Source.ASSUMED) if found is None else found
        return self._joining[tokens]

    def host_s(self, tokens: int, copies: int) -> tuple[float, float]:
        """Seconds of ``deciding`` and of ``joining``, kept: every layer of a run asks."""
        key = (tokens, copies)
        found = self._host_s.get(key)
        if found is None:
            found = self.deciding(tokens, copies).value, self.joining(tokens).value
            self._host_s[key] = found
        return found

    def knows(self) -> bool:
        """Whether this model's dense layers were measured where they are, and not estimated."""
        return all(
            self._calibrated(MIXER, mixer.params, 1, 1, mixer.kind) is not None
            for mixer in {layer.mixer for layer in self.model.layers}
        )

    def call(self, tokens: int) -> Estimate:
        """Time of a step of ``tokens`` tokens around its layers and head."""
        found = self._calibrated(CALL, self.model.head_params, tokens, tokens)
        cpu = self.hardware.cpu
        known = cpu.token_start_s if tokens == 1 else cpu.prompt_start_s
        if found is None and known is not None:
            found = constant(known)
        return Estimate(0.0, Source.ASSUMED) if found is None else found

    def extra(self, term: str) -> Estimate:
        """Time of one of ``EXTRAS``, for each token; 0 unless measured."""
        found = self._calibrated(term, self.model.head_params, 1, 1)
        return Estimate(0.0, Source.ASSUMED) if found is None else found

    def _calibrated(
        self,
        term: str,
        params: int,
        tokens: int,
        context: int,
        kind: str = "",
        fmt: str | None = None,
    ) -> Estimate | None:
        """What a calibration measured for a part of this model; None if nothing."""
        key = (term, kind, params, fmt or self.dense_format)
        if tokens == 1:
            return self._measured.decode(*key, context)
        return self._measured.prompt(*key, tokens, context - tokens)

    def pieces(self, prompt: int, batch: int = 1) -> list[tuple[int, int]]:
        """Cut a prompt as the runtime does: each piece's tokens, and those in the cache after it.

        Where several sequences are computed, or a GPU does, there is one piece.
        """
        return pieces(prompt, self._measured.piece(self.dense_format) if batch == 1 else 0)

    def head(self, rows: int, tokens: int | None = None) -> Estimate:
        """Time of the output head for ``rows`` positions of a step of ``tokens``, or of all."""
        tokens = rows if tokens is None else tokens
        found = self._calibrated(HEAD, self.model.head_params, tokens, tokens)
        return self.dense(self.model.head_params, rows) if found is None else found

    def dense(
        self, params: int, tokens: int, extra_bytes: float = 0.0, flop: float | None = None
    ) -> Estimate:
        """Time of a product of ``tokens`` rows with dense weights, where those live."""
        side = self.hardware.gpu or self.hardware.cpu
        read = weight_bytes(params, self.dense_format) * self._share + extra_bytes
        operations = 2 * params * tokens if flop is None else flop
        return larger(
            rate_time(read, side.memory_bytes_per_s, side.memory_efficiency),
            rate_time(operations, side.flop_per_s, side.flop_efficiency),
        )

    def disk_read(self, count: int = 1) -> Estimate:
        """Time to read ``count`` experts from the disk."""
        disk = self.hardware.disk
        each = rate_time(self.experts.bytes, disk.bytes_per_s) + constant(disk.latency_s)
        return each * count


def rate_time(amount: float, rate: Quantity, efficiency: Quantity | None = None) -> Estimate:
    """Time for ``amount`` at ``rate``, of which only ``efficiency`` is reached."""
    share = efficiency.value if efficiency else 1.0
    value = amount / (rate.value * share)
    source = weakest(rate.source, efficiency.source) if efficiency else rate.source
    parts = [q.error for q in (rate, efficiency) if q is not None and q.error is not None]
    return Estimate(value, source, value * math.hypot(*parts) if parts else None)


def constant(quantity: Quantity) -> Estimate:
    """Return a duration the hardware description states directly."""
    error = None if quantity.error is None else quantity.error * quantity.value
    return Estimate(quantity.value, quantity.source, error)


def larger(first: Estimate, second: Estimate) -> Estimate:
    """Return the binding one of two overlapped durations."""
    return first if first.value >= second.value else second


def interpolate(points: Sequence[Point], load: int) -> Estimate:
    """Duration at ``load`` from calibration points sorted by load.

    Between points linear and as good as the measurements; beyond the last, along the last
    segment and marked fitted.

    Raises
    ------
    CostError
        When ``load`` lies below the first point, or beyond a single one.
    """
    loads = [p.load for p in points]
    at = bisect_left(loads, load)
    if at < len(points) and loads[at] == load:
        return Estimate(points[at].seconds, Source.MEASURED, points[at].error)
    if at == 0 or len(points) < 2:
        raise CostError(
            f"no calibration point for load {load}; the points have loads {loads}",
            hint="calibrate this machine again, starting at one token",
        )
    inside = at < len(points)
    low, high = (points[at - 1], points[at]) if inside else (points[-2], points[-1])
    slope = (high.seconds - low.seconds) / (high.load - low.load)
    value = low.seconds + slope * (load - low.load)
    errors = [p.error for p in (low, high) if p.error is not None]
    return Estimate(
        max(0.0, value),
        Source.MEASURED if inside else Source.FITTED,
        max(errors) if errors else None,
    )
