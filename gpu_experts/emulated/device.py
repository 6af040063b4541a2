"""A device for machines without one: the same protocol, on the CPU.

In ``exact`` mode two threads are the lanes: slots lie in host memory, copies copy, and experts
are computed by the function that is given: the CPU path's kernels, as a rule. Work takes at least
as long as the given speeds say; without speeds it takes as long as it takes.

In ``timing`` mode nothing is copied nor computed. Each lane is a clock: work starts when the
lane and what it needs are free and lasts as long as the speeds say, and whoever waits for it
waits until that moment. Outputs are meaningless (``meaningful`` is False).

Because hidden states live in host memory, :meth:`EmulatedDevice.join` waits in both modes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_experts.checks import (
    as_arrays,
    check_compute,
    check_copy,
    check_slots,
    on_host,
    opened,
    require_content,
)
from gpu_experts.device import F32, I32, TIMEOUT_S, U8, Event, Memory, Run
from gpu_experts.emulated import EMULATED
from gpu_experts.emulated.lanes import Clock, ClockLane, Lane, ThreadLane
from gpu_experts.errors import ArgumentError, DeviceFailedError, DeviceMemoryError
from gpu_experts.events import DoneEvent
from hybrid.formats.block import Block
from hybrid.formats.notes import Note

Fault = Literal["copy", "compute", "memory", "stall"]


class EmulatedDevice:
    """A device made of host memory and two lanes.

    Parameters
    ----------
    capacity_bytes
        Memory that slots may take.
    mode
        ``"exact"`` or ``"timing"``, see the module.
    run
        What computes experts in exact mode: x ``[T, D]`` float32, slot ids ``[T, A]`` int32,
        routing weights ``[T, A]`` float32, slots ``[slots, stride]`` uint8, their layout, out
        ``[T, D]`` float32, all in host memory; called from a thread of the device's own.
    link_bytes_per_s, link_latency_s
        A copy takes ``latency + block / rate``.
    memory_bytes_per_s, flop_per_s, launch_s
        A compute takes ``launch`` plus, for every distinct slot,
        ``max(block / memory rate, 2 * parameters * load / flop rate)``.
    expert_s
        Seconds of one expert at a load, measured, in place of that maximum.
    timeout_s
        How long :meth:`to_host` waits at most.
    clock
        What is taken for the time.

    Raises
    ------
    ArgumentError
        When exact mode lacks ``run``, or a rate or time is negative.
    """

    backend = EMULATED
    dtype: torch.dtype | None = None

    def __init__(
        self,
        capacity_bytes: int,
        *,
        mode: Literal["exact", "timing"] = "exact",
        run: Run | None = None,
        link_bytes_per_s: float = math.inf,
        link_latency_s: float = 0.0,
        memory_bytes_per_s: float = math.inf,
        flop_per_s: float = math.inf,
        launch_s: float = 0.0,
        expert_s: Callable[[int], float] | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        if mode == "exact" and run is None:
            raise ArgumentError("exact mode computes: it needs run")
        if min(link_bytes_per_s, memory_bytes_per_s, flop_per_s) <= 0:
            raise ArgumentError("rates must be positive")
        if min(capacity_bytes, link_latency_s, launch_s) < 0:
            raise ArgumentError("capacity, latency and launch time cannot be negative")
        self.name = f"{self.backend.name}, {mode}"
        self.meaningful = mode == "exact"
        self.torch_device = torch.device("cpu")
        self.notes: list[Note] = []
        if mode == "timing":
            why = "the device only keeps time: its experts' outputs are zeros"
            remedy = "use exact mode, or a GPU, for text"
            self.notes.append(Note("the text is meaningless", why, remedy))
        self.link_bytes_per_s = link_bytes_per_s
        self.link_latency_s = link_latency_s
        self.memory_bytes_per_s = memory_bytes_per_s
        self.flop_per_s = flop_per_s
        self.launch_s = launch_s
        self._expert_s = expert_s
        self._capacity_bytes = capacity_bytes
        self._run = run
        self._timeout_s = timeout_s
        self._clock = clock or Clock()
        self._faults: dict[Fault, int] = {}
        self._layout: Block | None = None
        self._slots = 0
        self._memory: U8 | None = None
        self._lanes: tuple[Lane, Lane] | None = None
        self._written: dict[int, Event] = {}
        self._read: dict[int, Event] = {}

    def pin(self, pinned_bytes: int) -> None:
        """Nothing is gained by page-locking here."""

    def memory(self) -> Memory:
        used = 0 if self._layout is None else self._slots * self._layout.stride
        return Memory(self._capacity_bytes, self._capacity_bytes - used)

    def open(self, layout: Block, slots: int) -> None:
        check_slots(layout)
        self.close()
        asked = slots * layout.stride
        self._allocate(asked, f"{slots} slots of {layout.stride} bytes")
        if asked > self._capacity_bytes:
            fit = self._capacity_bytes // layout.stride
            raise DeviceMemoryError(
                f"{slots} slots take {asked} bytes, {self.name} has {self._capacity_bytes}",
                asked_bytes=asked,
                free_bytes=self._capacity_bytes,
                hint=f"ask for at most {fit} slots",
            )
        if self.meaningful:
            self._memory = np.zeros((slots, layout.stride), np.uint8)
            link, compute = ThreadLane("link", self._clock), ThreadLane("compute", self._clock)
            weakref.finalize(self, _close, link, compute)
            self._lanes = link, compute
        else:
            self._lanes = ClockLane(self._clock), ClockLane(self._clock)
        self._layout, self._slots = layout, slots

    def close(self) -> None:
        if self._lanes is not None:
            _close(*self._lanes)
        self._layout, self._slots, self._memory, self._lanes = None, 0, None, None
        self._written.clear()
        self._read.clear()

    def copy(self, block: U8, slot: int, what: str) -> Event:
        layout, (link, _) = self._opened()
        check_copy(layout, self._slots, block, slot)
        size = layout.block_bytes
        seconds = self.link_latency_s + size / self.link_bytes_per_s
        work, memory = _nothing, self._memory
        if memory is not None:
            work = partial(np.copyto, memory[slot, :size], block[:size])
        reader = self._read.get(slot)
        event = link.submit(
            what,
            *self._disturbed("copy", work, seconds),
            behind=() if reader is None else (reader,),
        )
        self._written[slot] = event
        return event

    def compute(
        self,
        x: Tensor,
        slot_ids: I32 | list[int],
        routing_weights: F32 | list[float],
        out: Tensor,
        after: Sequence[Event],
        what: str,
    ) -> Event:
        layout, (_, lane) = self._opened()
        loads = check_compute(layout, self._slots, x, slot_ids, routing_weights, out)
        require_content(loads, self._written)
        self._allocate(0, what)
        seconds = self.launch_s if loads else 0.0
        seconds += sum(map(self.expert_s, loads.values()))
        work: Callable[[], object] = _nothing
        memory, run = self._memory, self._run
        if memory is not None and run is not None:
            run_on = partial(run, on_host(x), *as_arrays(slot_ids, routing_weights))
            work = partial(run_on, memory, layout, out.numpy())
        event = lane.submit(
            what,
            *self._disturbed("compute", work, seconds),
            after=[*after, *[self._written[slot] for slot in loads]],
        )
        self._read.update(dict.fromkeys(loads, event))
        return event

    def expert_s(self, load: int) -> float:
        """Modelled seconds of one expert on ``load`` tokens, launch not included."""
        if self._expert_s is not None:
            return self._expert_s(load)
        layout = opened(self._layout)
        reading = layout.block_bytes / self.memory_bytes_per_s
        return max(reading, 2 * layout.parameters * load / self.flop_per_s)

    def new_output(self, tokens: int) -> Tensor:
        layout, _ = self._opened()
        self._allocate(4 * tokens * layout.hidden, "an output")
        return torch.zeros(tokens, layout.hidden)

    def to_host(
        self, *tensors: Tensor, meanwhile: Callable[[], object] | None = None
    ) -> tuple[NDArray[Any], ...]:
        last = None if self._lanes is None else self._lanes[1].last
        if meanwhile is not None:
            meanwhile()
        if last is None or not self.meaningful:  # nothing will change them
            found = tuple([on_host(tensor) for tensor in tensors])
        if last is not None:
            last.settled(self._timeout_s)
        if last is not None and self.meaningful:
            found = tuple([on_host(tensor) for tensor in tensors])
        return found

    def join(
        self,
        out: Tensor,
        cpu_out: NDArray[Any] | None,
        events: Sequence[Event],
        dtype: torch.dtype,
        timeout_s: float,
    ) -> Tensor:
        last = self._clock.now() + timeout_s
        for event in events:
            event.wait(max(0.0, last - self._clock.now()))
        total = out
        if cpu_out is not None:
            if self.meaningful:
                np.add(out.numpy(), cpu_out, out=cpu_out)
            total = torch.from_numpy(cpu_out)
        return total if dtype is torch.float32 else total.to(dtype)

    def occupy(self, seconds: float, what: str) -> Event:
        if self.meaningful:
            return DoneEvent(what, self._clock.now())
        _, (_, lane) = self._opened()
        return lane.submit(what, _nothing, seconds)

    def fail(self, kind: Fault, after: int = 0) -> None:
        """Let one thing go wrong, for tests: the next of its kind but ``after``.

        ``copy`` and ``compute`` fail when they run, ``memory`` refuses the next allocation
        (slots, an output or a compute's workspace), and ``stall`` is a copy or a compute that
        never ends.
        """
        self._faults[kind] = after

    def _opened(self) -> tuple[Block, tuple[Lane, Lane]]:
        layout = opened(self._layout)
        assert self._lanes is not None
        return layout, self._lanes

    def _due(self, kind: Fault) -> bool:
        """Whether the fault of this kind strikes now; counts down when it does not."""
        left = self._faults.pop(kind, None)
        if left:
            self._faults[kind] = left - 1
        return left == 0

    def _disturbed(
        self, kind: Fault, work: Callable[[], object], seconds: float
    ) -> tuple[Callable[[], object], float]:
        if not self._faults:
            return work, seconds
        if self._due("stall"):
            seconds = math.inf
        return (_injected if self._due(kind) else work), seconds

    def _allocate(self, asked_bytes: int, what: str) -> None:
        if self._faults and self._due("memory"):
            free = self.memory().free_bytes
            raise DeviceMemoryError(
                f"no memory for {what}: {asked_bytes} bytes asked for, {free} free (injected)",
                asked_bytes=asked_bytes,
                free_bytes=free,
                hint="use fewer slots",
            )


def _nothing() -> None:
    """What a lane does that only keeps time."""


def _injected() -> None:
    raise DeviceFailedError("injected fault")


def _close(*lanes: Lane) -> None:
    for lane in lanes:
        lane.close()
