"""The emulated device's clock: what takes how long, by a clock that only the test moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from gpu_experts.emulated.device import EmulatedDevice
from gpu_experts.emulated.lanes import Clock
from gpu_experts.errors import DeviceTimeoutError
from naive_gpu import Copy, small_layout, timeline
from stamped_slots import call, programs, stamp

LAYOUT = small_layout()
# Powers of two and whole numbers: sums of floats are exact.
COPY_S = 0.25 + LAYOUT.block_bytes / 1024


class ManualClock(Clock):
    """Stands still but for waits."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def until(self, deadline: float) -> None:
        self.time = max(self.time, deadline)


def device(clock: Clock, **options) -> EmulatedDevice:
    """Copies take a quarter second and a byte a 1024th; computes one second to launch."""
    made = EmulatedDevice(
        1 << 20,
        mode="timing",
        link_bytes_per_s=1024.0,
        link_latency_s=0.25,
        launch_s=1.0,
        timeout_s=1000.0,
        clock=clock,
        **options,
    )
    made.open(LAYOUT, 4)
    return made


@given(program=programs())
def test_every_span_is_the_naive_timelines(program) -> None:
    """Any copies and computes: the lanes' arithmetic, exactly, against a quadratic twin."""
    clock = ManualClock()
    target = device(clock, expert_s=lambda load: 0.5 * load)
    events = [
        target.copy(stamp(step.block), step.slot, "copy")
        if isinstance(step, Copy)
        else call(target, step.slots)[1]
        for step in program
    ]
    assert clock.time == 0.0
    clock.time = math.inf
    spans = [event.span() for event in events]
    assert spans == timeline(program, COPY_S, lambda load: 0.5 * load, 1.0)


def test_an_expert_is_bound_by_memory_or_by_arithmetic() -> None:
    """Bytes over the memory's rate, or two operations a weight and token, whichever is longer."""
    target = device(ManualClock(), memory_bytes_per_s=512.0, flop_per_s=96.0)
    reading = LAYOUT.block_bytes / 512
    assert LAYOUT.parameters == 48
    assert target.expert_s(1) == reading
    assert target.expert_s(100) == 100.0
    target.copy(stamp(0), 0, "copy").wait(100)
    target.copy(stamp(0), 1, "copy").wait(100)
    ids = np.array([[0, 1], [0, -1], [0, -1]] + [[0, -1]] * 97, np.int32)
    out = target.new_output(100)
    event = target.compute(
        torch.zeros(100, 4), ids, np.ones(ids.shape, np.float32), out, [], "compute"
    )
    event.wait(1000)
    start, end = event.span()
    assert end - start == 1.0 + 100.0 + reading


def test_a_compute_of_nothing_takes_no_time() -> None:
    """When no token goes to any slot, nothing is launched."""
    clock = ManualClock()
    target = device(clock)
    out = target.new_output(1)
    none, ones = np.full((1, 2), -1, np.int32), np.ones((1, 2), np.float32)
    event = target.compute(torch.zeros(1, 4), none, ones, out, [], "compute")
    assert event.done()
    assert event.span() == (0.0, 0.0)


def test_work_starts_when_it_is_called_and_no_sooner() -> None:
    """A lane that was idle starts at the time of the call, not where it ended."""
    clock = ManualClock()
    target = device(clock)
    first = target.copy(stamp(0), 0, "first")
    clock.time = 100.0
    second = target.copy(stamp(0), 1, "second")
    assert first.done()
    assert not second.done()
    second.wait(100)
    assert second.span() == (100.0, 100.0 + COPY_S)
    assert clock.time == 100.0 + COPY_S


def test_events_given_as_after_are_waited_for() -> None:
    """A compute starts after a copy it is told of, even into a slot that it does not read."""
    clock = ManualClock()
    target = device(clock)
    target.copy(stamp(0), 0, "needed")
    other = target.copy(stamp(0), 1, "other")
    _, event = call(target, [0], after=[other])
    event.wait(1000)
    assert event.span()[0] == 2 * COPY_S


def test_occupying_the_compute_lane() -> None:
    """Dense work delays experts behind it; to_host waits for it, but not for what follows."""
    clock = ManualClock()
    target = device(clock)
    target.copy(stamp(0), 0, "copy").wait(1000)
    now = clock.time
    dense = target.occupy(64.0, "attention")
    _, event = call(target, [0])
    target.to_host(torch.zeros(1))
    assert clock.time == event.end == now + 65.0
    assert dense.span() == (now, now + 64.0)
    target.occupy(8.0, "attention")
    target.to_host(torch.zeros(1), meanwhile=lambda: target.occupy(100.0, "shared expert"))
    assert clock.time == now + 73.0
    exact = EmulatedDevice(4096, run=lambda *arguments: None)
    assert exact.occupy(100.0, "attention").done()


def test_a_join_waits_for_the_last_of_its_events() -> None:
    """The result is there when the last event is over; what comes after it is not waited for."""
    clock = ManualClock()
    target = device(clock)
    target.copy(stamp(0), 0, "copy")
    out, event = call(target, [0])
    target.copy(stamp(0), 1, "prefetch")
    assert target.join(out, np.ones((1, 4), np.float32), [event], torch.float32, 60).sum() == 4
    assert clock.time == event.end


def test_a_timeout_ends_when_it_should() -> None:
    """A wait shorter than the work is given up at its own time, not at the work's."""
    clock = ManualClock()
    target = device(clock)
    event = target.copy(stamp(0), 0, "copy")
    with pytest.raises(DeviceTimeoutError):
        event.wait(COPY_S / 2)
    assert clock.time == COPY_S / 2
    event.wait(COPY_S)
    assert clock.time == COPY_S


def test_the_real_clock_is_never_early() -> None:
    """Waiting ends at the deadline or after it, for lengths around the spinning part."""
    clock = Clock()
    for seconds in (-1.0, 0.0, 1e-5, 2e-4, 1e-3):
        deadline = clock.now() + seconds
        clock.until(deadline)
        assert clock.now() >= deadline
