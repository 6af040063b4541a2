"""What a device is: slots, a copy lane, a compute lane, and events that tell when.

A device holds experts in equally sized slots. Two lanes run beside the host, each in the order
in which work was handed to it: the link copies blocks from host memory into slots, the compute
lane runs experts. For every slot the two behave as if everything had run in the order of the
calls: a compute reads what the last copy called before it brings, and a copy overwrites a slot
only when the computes called before it have read it. That is the device's own business;
the caller never waits for it.

A device is used from one thread at a time. Nothing that it raises is a bare framework error:
see :mod:`gpu_experts.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.block import Block
from hybrid.formats.notes import Note

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gpu_experts.backend import Backend

U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

#: ``run(x, slot_ids, routing_weights, slots, layout, out)``: add the experts' weighted outputs to
#: ``out``, on the CPU; all arrays are in host memory.
Run = Callable[[F32, I32, F32, U8, Block, F32], object]

#: How long a wait without a time of its own lasts before it gives the device up.
TIMEOUT_S = 60.0


class Memory(NamedTuple):
    """A device's memory as it sees it now."""

    total_bytes: int
    free_bytes: int


class Event(Protocol):
    """Something that was handed to a lane."""

    @property
    def what(self) -> str:
        """What it is, for messages and reports."""

    def done(self) -> bool:
        """Whether it is over, well or not; never waits."""

    def wait(self, timeout_s: float) -> None:
        """Return once it ended well.

        Raises
        ------
        DeviceTimeoutError
            When it is not over after ``timeout_s``; it may still end later.
        DeviceFailedError, DeviceMemoryError
            When it failed, or something it needed did.
        """

    def span(self) -> tuple[float, float] | None:
        """Start and end on ``time.perf_counter``'s clock, once it ended well; None before."""


class Device(Protocol):
    """Runs experts from its own memory.

    Attributes
    ----------
    name
        For reports and calibrations, see :class:`~gpu_experts.backend.Backend`.
    backend
        What kind of device it is.
    dtype
        What dense layers compute in there unless another type is asked for; None is what they do
        on the CPU.
    meaningful
        Whether results are the experts' outputs; False where only time is modelled.
    torch_device
        Where hidden states and outputs live.
    notes
        What runs slower or holds less than it could, one entry each.
    """

    name: str
    backend: Backend
    dtype: torch.dtype | None
    meaningful: bool
    torch_device: torch.device
    notes: list[Note]

    def pin(self, pinned_bytes: int) -> None:
        """Say how much host memory may be page-locked for copies, from the next ``open`` on."""

    def memory(self) -> Memory:
        """Total and free bytes now."""

    def open(self, layout: Block, slots: int) -> None:
        """Allocate ``slots`` slots for such blocks; earlier slots and their content are gone.

        Raises
        ------
        DeviceMemoryError
            When they do not fit; the device then has no slots.
        """

    def close(self) -> None:
        """Give everything back. What is still running fails; calling it twice is harmless."""

    def copy(self, block: U8, slot: int, what: str) -> Event:
        """Enqueue a copy of ``block`` into ``slot`` on the link.

        Parameters
        ----------
        block
            uint8, at least ``layout.block_bytes``, often a view of a mapped file; must stay as
            it is until the event is done.

        Raises
        ------
        SlotError, ShapeError
            When there is no such slot, or the block is too short.
        """

    def compute(
        self,
        x: Tensor,
        slot_ids: I32 | list[int],
        routing_weights: F32 | list[float],
        out: Tensor,
        after: Sequence[Event],
        what: str,
    ) -> Event:
        """Enqueue ``out[t] += sum_a routing_weights[t, a] * expert in slot_ids[t, a] (x[t])``.

        Parameters
        ----------
        x
            ``[T, D]`` in the model's dtype on ``torch_device``; not to be written until the
            event is done or :meth:`join` returned. So is ``out``.
        slot_ids, routing_weights
            ``[T, A]``; -1 means elsewhere. Free for reuse when this returns. Lists ``[A]`` of
            different slots are one token's.
        out
            ``[T, D]`` float32 on ``torch_device``, from :meth:`new_output`.
        after
            What must have ended well first, besides the last copy into each slot.

        Raises
        ------
        SlotError
            When a slot does not exist or nothing was ever copied into it.
        ShapeError
            When shapes or types disagree.
        DeviceMemoryError
            When there is no room for intermediate results; nothing was enqueued.
        """

    def new_output(self, tokens: int) -> Tensor:
        """Zeroed ``[tokens, D]`` float32 on ``torch_device``.

        Raises
        ------
        DeviceMemoryError
            When there is no room for it.
        """

    def to_host(
        self, *tensors: Tensor, meanwhile: Callable[[], object] | None = None
    ) -> tuple[NDArray[Any], ...]:
        """The tensors in host memory, after one wait for all that was enqueued for them.

        Floating ones become float32; all are C-contiguous.

        Parameters
        ----------
        meanwhile
            Called once the copies are enqueued: what it enqueues does not hold them up, and what
            it does takes no time where the host would wait longer.

        Raises
        ------
        DeviceTimeoutError
            When the device does not get there.
        DeviceFailedError
            When it can do nothing any more. A failure of single work is told by its event.
        """

    def join(
        self,
        out: Tensor,
        cpu_out: NDArray[Any] | None,
        events: Sequence[Event],
        dtype: torch.dtype,
        timeout_s: float,
    ) -> Tensor:
        """``out + cpu_out`` as ``dtype`` on ``torch_device``, once ``events`` ended well.

        The host need not wait for that where later work is ordered behind it by the device.
        ``cpu_out`` is the device's from now on.

        Raises
        ------
        DeviceTimeoutError, DeviceFailedError, DeviceMemoryError
            When an event does not end well in ``timeout_s``; ``out`` is void then.
        """

    def occupy(self, seconds: float, what: str) -> Event:
        """Stand for dense work of that length on the compute lane, where time is modelled.

        Elsewhere the dense work is real and this does nothing.
        """
