"""Getting blocks to where a GPU can fetch them from: pinned buffers, and a thread that fills them.

A GPU copies from pinned host memory beside everything else; from ordinary memory, such as a
mapped file, it cannot. So a block goes through a ring of a few pinned buffers, or, as far as the
budget allows, into a pinned copy that is made when the block is first used and kept. Filling a
buffer takes as long as the copy itself: a thread does it, in the order of the calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from gpu_experts.device import U8, Event

if TYPE_CHECKING:
    from torch import Tensor

#: Buffers of the ring: one is filled while others are on their way.
RING_BUFFERS = 4
#: Pinned copies are allocated in slabs of about this size: an allocation of pinned memory is slow.
SLAB_BYTES = 64 << 20

#: Allocate so many bytes of host memory that the device can fetch from; MemoryError when refused.
Allocate = Callable[[int], "Tensor"]


class Feeder:
    """Runs jobs one after the other in a thread that starts with the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None]
        self._queue = SimpleQueue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # Each counter has one writer, so that no lock is needed to compare them.
        self._submitted = 0
        self._finished = 0

    @property
    def idle(self) -> bool:
        """Whether every job submitted so far is over."""
        return self._submitted == self._finished

    def submit(self, job: Callable[[], None], abandon: Callable[[], None]) -> None:
        """Run ``job``, which must not raise, or ``abandon`` when closed before its turn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._submitted += 1
        self._queue.put((job, abandon))

    def close(self, timeout_s: float = 10.0) -> None:
        """Abandon what waits; give the job that runs this long to end."""
        self._closed.set()
        self._queue.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            job, abandon = entry
            (abandon if self._closed.is_set() else job)()
            self._finished += 1
            del entry, job, abandon  # what they hold is large, and the next may be long in coming


class HostBlocks:
    """Blocks in memory that the device can fetch from.

    Parameters
    ----------
    block_bytes
        Bytes of every block.
    budget_bytes
        Host memory for the ring and for pinned copies together. The ring takes at least one
        buffer, however small the budget.
    allocate
        Where host memory comes from.
    wait
        ``wait(event)`` returns once the copy from a buffer is over, or raises.

    Notes
    -----
    A block is known by its address. Only read-only blocks are kept (a view of a store is one):
    what may change is read again each time. One thread calls :meth:`fetch`; :meth:`kept` may
    be called from another.
    """

    def __init__(
        self,
        block_bytes: int,
        budget_bytes: int,
        allocate: Allocate,
        wait: Callable[[Event], None],
    ) -> None:
        self.block_bytes = block_bytes
        # A multiple of 64, so that no two blocks share a cache line.
        self._pitch = -(-block_bytes // 64) * 64
        self._allocate = allocate
        self._wait = wait
        buffers = max(1, min(RING_BUFFERS, budget_bytes // self._pitch))
        self._ring: list[Tensor] = list(allocate(buffers * self._pitch).view(buffers, self._pitch))
        self._busy: list[Event | None] = [None] * buffers
        self._next = 0
        self._budget_bytes = max(0, budget_bytes - buffers * self._pitch)
        self._free: list[Tensor] = []
        self._kept: dict[int, tuple[Tensor, U8]] = {}
        self.refused: str | None = None

    @property
    def ring_buffers(self) -> int:
        """How many buffers the ring has."""
        return len(self._ring)

    @property
    def kept_blocks(self) -> int:
        """How many blocks have a pinned copy."""
        return len(self._kept)

    def kept(self, block: U8) -> Tensor | None:
        """The pinned copy of ``block`` if there is one."""
        buffer, _ = self._kept.get(_address(block), (None, None))
        return buffer

    def fetch(self, block: U8, event: Event) -> Tensor:
        """Return ``block`` in memory that the device can fetch from.

        Parameters
        ----------
        event
            Of the copy that will read it; a buffer of the ring is used again once that is done.
        """
        kept = self.kept(block)
        if kept is not None:
            return kept
        keep = not block.flags.writeable and self._room()
        buffer = self._free.pop() if keep else self._buffer(event)
        np.copyto(buffer.numpy()[: self.block_bytes], block[: self.block_bytes])
        if keep:
            # The block stays referenced: while it is, nothing else can get its address.
            self._kept[_address(block)] = buffer, block
        return buffer

    def _room(self) -> bool:
        """Whether a pinned copy can be made, after allocating another slab where need be."""
        if self._free:
            return True
        count = min(max(1, SLAB_BYTES // self._pitch), self._budget_bytes // self._pitch)
        if not count:
            return False
        try:
            slab = self._allocate(count * self._pitch)
        except (MemoryError, RuntimeError) as error:
            self.refused, self._budget_bytes = str(error), 0
            return False
        self._budget_bytes -= count * self._pitch
        self._free = list(slab.view(count, self._pitch))
        return True

    def _buffer(self, event: Event) -> Tensor:
        at = self._next
        self._next = (at + 1) % len(self._ring)
        busy = self._busy[at]
        if busy is not None and not busy.done():
            self._wait(busy)
        self._busy[at] = event
        return self._ring[at]


def _address(block: U8) -> int:
    return int(block.__array_interface__["data"][0])
