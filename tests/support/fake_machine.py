"""A machine that takes known times, and what measuring it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from gpu_experts.emulated import EMULATED
from hybrid.formats.block import Block
from hybrid.measure.describe import Measured, ModelParts
from hybrid.measure.device import DeviceTimes, device_times
from hybrid.measure.experts import Budget, DiskTimes, ExpertTimes
from hybrid.measure.interference import Times
from hybrid.measure.terms_of_step import Part
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER

SHAPE = Block(hidden=64, intermediate=32, format="q4_0")
WEIGHTS = 3 * 64 * 32
BYTES = WEIGHTS * 4.5 / 8
WHEN = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)


class Clock:
    """Stands still until something takes time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def calm() -> Times:
    """A system that counts nothing."""
    return Times(0.0, 0.0, 0.0)


def measured() -> Measured:
    """A machine of round numbers: 10 GB/s, experts at half of it."""
    times = ExpertTimes(
        SHAPE, [1e-5, 3e-5, 2e-5], {1: [2 * BYTES / 10e9] * 3, 512: [512 * 2 * WEIGHTS / 1e12] * 3}
    )
    parts = [
        Part(MIXER, "full", 1000, 2, 2, (4e-3,)),
        Part(MIXER, "full", 1000, 1, 9, (1e-3, 3e-3)),
        Part(DENSE, "", 10, 1, 9, (0.0,)),
        Part(HEAD, "", 500, 1, 9, (1e-3,)),
        Part(HEAD, "", 500, 1, 90, (3e-3,)),
        Part(CALL, "", 500, 1, 9, (5e-3,)),
        Part(CALL, "", 500, 2, 2, (6e-3,)),
        Part(CPU, "", WEIGHTS, 1, 1, (7e-6,)),
    ]
    return Measured(
        reads=[9e9, 10e9, 11e9],
        disk=DiskTimes([1e9], [1e-4], cached=False),
        experts=[times],
        parts=[ModelParts("qwen3_moe", "q4_0", "bf16", parts)],
    )


@dataclass
class Done:
    """An event; waiting for it takes until its end."""

    clock: Clock
    start_s: float
    end_s: float
    what: str = ""

    def done(self) -> bool:
        return self.clock.now_s >= self.end_s

    def wait(self, timeout_s: float) -> None:
        self.clock.now_s = max(self.clock.now_s, self.end_s)

    def span(self) -> tuple[float, float]:
        return self.start_s, self.end_s


@dataclass
class FakeDevice:
    """Copies at 1 kB/s with a latency of 2 s; a launch takes 3 s, an expert 5 s a token."""

    clock: Clock
    name: str = "fake"
    backend: Any = EMULATED
    dtype: Any = None
    torch_device: Any = torch.device("cpu")  # noqa: RUF009
    opened: list[int] = field(default_factory=list)
    link_free_s: float = 0.0

    def memory(self) -> Any:
        return type("Memory", (), {"total_bytes": 1 << 30, "free_bytes": 1 << 29})

    def open(self, layout: Any, slots: int) -> None:
        self.opened.append(slots)

    def close(self) -> None:
        self.opened.append(0)

    def copy(self, block: Any, slot: int, what: str) -> Done:
        begin_s = max(self.clock.now_s, self.link_free_s)
        first = 2.0 if begin_s == self.clock.now_s else 0.0
        self.link_free_s = begin_s + first + SHAPE.block_bytes / 1e3
        return Done(self.clock, begin_s, self.link_free_s)

    def new_output(self, tokens: int) -> torch.Tensor:
        return torch.zeros(tokens, SHAPE.hidden)

    def compute(
        self, x: torch.Tensor, ids: Any, weights: Any, out: Any, after: Sequence[Any], what: str
    ) -> Done:
        seconds = 3.0 + 5.0 * ids.size
        return Done(self.clock, self.clock.now_s, self.clock.now_s + seconds)


class FakeLayer:
    """Experts that take a second a call."""

    shape = SHAPE

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.blocks = np.zeros((20, SHAPE.block_bytes), np.uint8)

    def __call__(self, *_: Any) -> None:
        self.clock.now_s += 1.0


def device_found() -> tuple[FakeDevice, DeviceTimes]:
    clock = Clock()
    device: Any = FakeDevice(clock)
    return device, device_times(device, [FakeLayer(clock)], 4, Budget(1e9, clock), clock)
