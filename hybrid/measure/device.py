"""What a device does beside the CPU: copies, alone and beside the CPU's experts, and experts.

Times are the device's own spans where it states them, so that waiting here is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import median, pstdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hybrid.formats.block import Block
from hybrid.formats.registry import weight_bytes
from hybrid.measure.experts import LOADS, Budget
from planner.describe.estimate import Source
from planner.describe.hardware import Gpu, Link, Point, Quantity

if TYPE_CHECKING:
    from gpu_experts.device import Device, Event

SLOTS = 16
COPIES = 12
_TIMEOUT_S = 30.0


@dataclass
class DeviceTimes:
    """What a device took; samples in seconds.

    Attributes
    ----------
    name, memory_bytes
        The device.
    shape
        The experts that were copied and computed.
    block_bytes
        Of one of them, as it is copied.
    copies, copies_beside
        Of one expert, alone and while the CPU computes.
    cpu_alone, cpu_beside
        Of a call of the CPU's experts, alone and while copies run.
    latency_s
        Of a copy, beyond what its bytes take in a long row of copies.
    launch_s
        Of a call, beyond its experts.
    loads
        Load to samples of what one expert adds to a call.
    """

    name: str
    memory_bytes: int
    shape: Block
    block_bytes: int
    reserve_bytes: int | None = None
    copies: list[float] = field(default_factory=list)
    copies_beside: list[float] = field(default_factory=list)
    cpu_alone: list[float] = field(default_factory=list)
    cpu_beside: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    launch_s: list[float] = field(default_factory=list)
    loads: dict[int, list[float]] = field(default_factory=dict)

    def gpu(self, command: str) -> Gpu:
        """Describe the device: rates are what its kernels reach, so efficiencies are 1."""
        params = (3 if self.shape.gated else 2) * self.shape.hidden * self.shape.intermediate
        size, most = weight_bytes(params, self.shape.format_name), max(self.loads)
        reached = Quantity(1.0, Source.MEASURED, f"{command}: the rate is what kernels reach", 0.0)
        gpu = Gpu(
            name=self.name,
            vram_bytes=Quantity(
                float(self.memory_bytes), Source.MEASURED, f"{command}: the device's own figure"
            ),
            memory_bytes_per_s=_quantity(
                [size / max(s, 1e-12) for s in self.loads[1]], f"{command}: experts, one token each"
            ),
            flop_per_s=_quantity(
                [2 * params * most / max(s, 1e-12) for s in self.loads[most]],
                f"{command}: experts, {most} tokens each",
            ),
            memory_efficiency=reached,
            flop_efficiency=reached,
            launch_s=_quantity(self.launch_s, f"{command}: a call besides its experts"),
        )
        if self.reserve_bytes is None:
            return gpu
        reserve = Quantity(self.reserve_bytes, Source.ASSUMED, "driver and compiled kernels")
        return replace(gpu, reserve_bytes=reserve)

    def link(self, command: str) -> Link:
        """Describe the way to it."""
        slowdown = median(self.cpu_beside) / median(self.cpu_alone)
        return Link(
            bytes_per_s=_quantity(
                [self.block_bytes / max(s, 1e-12) for s in self.copies],
                f"{command}: experts in a row of {COPIES}; beside the CPU's experts "
                f"{self.block_bytes / max(median(self.copies_beside), 1e-12):.3g}",
            ),
            latency_s=_quantity(self.latency_s, f"{command}: one copy beyond its bytes"),
            cpu_slowdown=Quantity(
                max(1.0, slowdown),
                Source.MEASURED,
                f"{command}: the CPU's experts beside copies and alone",
                pstdev(self.cpu_beside) / median(self.cpu_beside),
            ),
        )

    def points(self) -> list[Point]:
        """Calibration points of the device's experts and of copies."""
        lanes = [("gpu", load, samples) for load, samples in sorted(self.loads.items())]
        lanes.append(("copy", 0, self.copies))
        return [
            Point(
                lane=lane,
                hidden=self.shape.hidden,
                intermediate=self.shape.intermediate,
                format=self.shape.format_name,
                load=load,
                seconds=float(median(samples)),
                error=float(pstdev(samples)) if len(samples) > 1 else None,
                matrices=3 if self.shape.gated else 2,
            )
            for lane, load, samples in lanes
        ]


def device_times(
    device: Device,
    layers: Sequence[Any],
    top_k: int,
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceTimes:
    """Measure ``device`` with experts of ``layers``, each with ``blocks`` and a ``shape``.

    Parameters
    ----------
    device
        Opened and closed here.
    layers
        Experts of some layers; callable as :class:`~hybrid.packed.experts.LayerExperts`.
    top_k
        Experts of a token on the CPU, where copies run beside it.
    budget
        Larger loads are left out when it is used up.
    clock
        For what the device does not time itself.

    Raises
    ------
    GpuExpertsError
        When the device does not do what it is asked to.
    """
    shape, blocks = layers[0].shape, [block for layer in layers for block in layer.blocks]
    slots = min(SLOTS, len(blocks))
    layout = shape.with_stride(layers[0].blocks.shape[1])
    total, reserve = device.memory().total_bytes, device.backend.reserve_bytes
    found = DeviceTimes(device.name, total, shape, layout.block_bytes, reserve)
    device.open(layout, slots)
    try:
        _copies(device, layers, blocks, slots, top_k, found, clock)
        _experts(device, slots, budget, found, clock)
    finally:
        device.close()
    return found


def _seconds(events: Sequence[Event], begun_s: float, clock: Callable[[], float]) -> float:
    """From the first event's start to the last one's end, once all are over."""
    for event in events:
        event.wait(_TIMEOUT_S)
    ended_s = clock()
    first, last = events[0].span(), events[-1].span()
    return last[1] - first[0] if first and last else ended_s - begun_s


def _copies(
    device: Device,
    layers: Sequence[Any],
    blocks: Sequence[Any],
    slots: int,
    top_k: int,
    found: DeviceTimes,
    clock: Callable[[], float],
) -> None:
    at = 0

    def row(count: int) -> tuple[float, list[Event]]:
        nonlocal at
        begun_s, events = clock(), []
        for _ in range(count):
            events.append(device.copy(blocks[at % len(blocks)], at % slots, "calibration"))
            at += 1
        return begun_s, events

    def on_cpu() -> float:
        ids = torch.randint(0, len(layers[0].blocks), (1, top_k))
        x = torch.randn(1, found.shape.hidden)
        begun_s = clock()
        layers[at % len(layers)](x, ids, torch.full(ids.shape, 1 / top_k))
        return clock() - begun_s

    begun_s, events = row(max(slots, COPIES))  # every slot holds something from here on
    _seconds(events, begun_s, clock)
    for _ in range(5):
        begun_s, events = row(COPIES)
        found.copies.append(_seconds(events, begun_s, clock) / COPIES)
    for _ in range(8):
        begun_s, events = row(1)
        found.latency_s.append(max(0.0, _seconds(events, begun_s, clock) - median(found.copies)))
    on_cpu()
    found.cpu_alone += [on_cpu() for _ in range(12)]
    for _ in range(5):
        begun_s, events = row(COPIES)
        beside = [on_cpu()]
        while not events[-1].done():
            beside.append(on_cpu())
        # The last call may have ended after the copies.
        found.cpu_beside += beside[:-1] or beside
        found.copies_beside.append(_seconds(events, begun_s, clock) / COPIES)


def _experts(
    device: Device,
    slots: int,
    budget: Budget,
    found: DeviceTimes,
    clock: Callable[[], float],
) -> None:
    def call(load: int, experts: int) -> float:
        """Every one of ``load`` tokens uses the same experts."""
        # As a model computes on such a device: float32 would leave its tensor cores idle.
        dtype = device.dtype or torch.float32
        x = torch.randn(load, found.shape.hidden).to(device.torch_device, dtype)
        ids = np.tile(np.arange(experts, dtype=np.int32), (load, 1))
        weights = np.full(ids.shape, 1 / experts, np.float32)
        out = device.new_output(load)
        begun_s = clock()
        event = device.compute(x, ids, weights, out, (), "calibration")
        return _seconds([event], begun_s, clock)

    many = min(slots, 8)
    one = budget.repeat(partial(call, 1, 1), 3, 12)
    all_s = budget.repeat(partial(call, 1, many), 3, 12)
    each_s = (median(all_s) - median(one)) / (many - 1) if many > 1 else median(one)
    found.launch_s = [max(0.0, seconds - each_s) for seconds in one]
    launch_s = median(found.launch_s)
    found.loads[1] = [max(0.0, seconds - launch_s) / many for seconds in all_s]
    last_s = 0.0
    for load in islice(LOADS, 1, None):
        if 2.5 * last_s > budget.left_s():
            break
        before_s = budget.left_s()
        samples = budget.repeat(partial(call, load, many), 2, 5)
        last_s = before_s - budget.left_s()
        found.loads[load] = [max(0.0, seconds - launch_s) / many for seconds in samples]


def _quantity(samples: Sequence[float], origin: str) -> Quantity:
    value = float(median(samples))
    error = float(pstdev(samples) / value) if len(samples) > 1 and value else None
    return Quantity(value, Source.MEASURED, f"{origin}, median of {len(samples)}", error)
