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
#: Pinned copies are allocated in slabs of this size, or of eight blocks if that is more: an
#: allocation of pinned memory is slow, and torch makes every one a power of two.
SLAB_BYTES = 64 << 20
_SLAB_BLOCKS = 8

#: Allocate so many bytes of host memory that the device can fetch from; MemoryError when refused.
Allocate = Callable[[int], "Tensor"]


class Feeder:
    """Runs jobs one after the other in a thread that starts with the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: _Job | None = None

    @property
    def idle(self) -> bool:
        """Whether every job submitted so far is over."""
        return self._last is None or self._last.over

    def submit(self, job: Callable[[], None], abandon: Callable[[], None]) -> None:
        """Run ``job``, which must not raise, or ``abandon`` when closed before its turn."""
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        # In this order: Ctrl-C between the two leaves a job that never runs, and the next one
        # puts that right.
        self._last = _Job(job, abandon)
        self._queue.put(self._last)

    def close(self, timeout_s: float = 10.0) -> None:
        """Abandon what waits; give the job that runs this long to end."""
        self._closed.set()
        self._queue.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            work = job.abandon if self._closed.is_set() else job.work
            work()
            # What they hold is large, and the next may be long in coming.
            job.work = job.abandon = _nothing
            job.over = True
            del job, work


class _Job:
    """What the thread does, or does instead when it is closed before."""

    __slots__ = ("abandon", "over", "work")

    def __init__(self, work: Callable[[], None], abandon: Callable[[], None]) -> None:
        self.work, self.abandon, self.over = work, abandon, False


def _nothing() -> None:
    """What is left of a job that is over."""


class HostBlocks:
    """Blocks in memory that the device can fetch from.

    Parameters
    ----------
    block_bytes
        Bytes of every block.
    budget_bytes
        Host memory for the ring and for pinned copies together, in allocations of whole powers
        of two. The ring takes at least one buffer, however small the budget.
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
        self._budget_bytes = max(budget_bytes, _power_from(self._pitch))
        self._ring = self._slab(RING_BUFFERS * self._pitch)
        self._busy: list[Event | None] = [None] * len(self._ring)
        self._next = 0
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
        if not self._free:
            try:
                self._free = self._slab(max(SLAB_BYTES, _SLAB_BLOCKS * self._pitch))
            except (MemoryError, RuntimeError) as error:
                self.refused, self._budget_bytes = str(error), 0
        return bool(self._free)

    def _slab(self, nbytes: int) -> list[Tensor]:
        """Allocate so many bytes, rounded to a power of two within the budget, as buffers."""
        size = min(_power_from(nbytes), _power_to(self._budget_bytes))
        count = size // self._pitch
        if not count:
            return []
        buffers = self._allocate(count * self._pitch).view(count, self._pitch)
        self._budget_bytes -= size
        return list(buffers)

    def _buffer(self, event: Event) -> Tensor:
        at = self._next
        self._next = (at + 1) % len(self._ring)
        busy = self._busy[at]
        if busy is not None and not busy.done():
            self._wait(busy)
        self._busy[at] = event
        return self._ring[at]


def _power_from(nbytes: int) -> int:
    """The least power of two that holds ``nbytes``."""
    return 1 << max(0, nbytes - 1).bit_length()


def _power_to(nbytes: int) -> int:
    """The largest power of two in ``nbytes``; 0 where there is none."""
    return 1 << nbytes.bit_length() - 1 if nbytes else 0


def _address(block: U8) -> int:
    return int(block.__array_interface__["data"][0])
