"""Pinned buffers and the thread that fills them, without a GPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from gpu_experts.cuda.feeder import Feeder, HostBlocks
from gpu_experts.errors import DeviceTimeoutError
from gpu_experts.events import poll

BLOCK = 128


class FakeEvent:
    """A copy that is over when the test says so."""

    what = "copy"

    def __init__(self, over: bool = False) -> None:
        self.over = over

    def done(self) -> bool:
        return self.over

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("the test decides what is waited for")

    def span(self) -> None:
        return None


def allocate(nbytes: int) -> torch.Tensor:
    """Host memory; nothing pins here."""
    return torch.zeros(nbytes, dtype=torch.uint8)


def store(count: int, *, writeable: bool = False) -> np.ndarray:
    """Blocks that hold their number, read-only like a mapped store."""
    blocks = np.repeat(np.arange(count, dtype=np.uint8), BLOCK).reshape(count, BLOCK)
    blocks.flags.writeable = writeable
    return blocks


def test_a_ring_buffer_is_filled_again_only_when_its_copy_is_over() -> None:
    """As many blocks as buffers go through at once; the next waits for the oldest copy."""
    waited = []

    def wait(event) -> None:
        waited.append(event)
        event.over = True

    host = HostBlocks(BLOCK, 2 * BLOCK, allocate, wait)
    assert host.ring_buffers == 2
    blocks, events = store(5), [FakeEvent() for _ in range(5)]
    first = host.fetch(blocks[0], events[0])
    second = host.fetch(blocks[1], events[1])
    assert waited == []
    assert (first[0], second[0]) == (0, 1)
    third = host.fetch(blocks[2], events[2])
    assert waited == [events[0]]
    assert third.data_ptr() == first.data_ptr()
    assert (third == 2).all()
    events[1].over = True
    host.fetch(blocks[3], events[3])
    assert waited == [events[0]]
    host.fetch(blocks[4], events[4])
    assert waited == [events[0], events[2]]


def test_blocks_are_kept_as_far_as_the_budget_allows() -> None:
    """The first blocks that are used get pinned copies of their own, the others use the ring."""
    host = HostBlocks(BLOCK, 6 * BLOCK, allocate, lambda event: None)
    assert host.ring_buffers == 4
    blocks = store(4)
    kept = [host.fetch(blocks[at], FakeEvent(True)) for at in (2, 0)]
    assert host.kept_blocks == 2
    passing = host.fetch(blocks[1], FakeEvent(True))
    assert host.kept_blocks == 2
    assert host.kept(blocks[1]) is None
    for at, buffer in zip((2, 0), kept, strict=True):
        again = host.fetch(blocks[at], FakeEvent())
        assert again.data_ptr() == buffer.data_ptr() == host.kept(blocks[at]).data_ptr()
        assert (again == at).all()
    assert passing.data_ptr() not in [buffer.data_ptr() for buffer in kept]


def test_a_block_that_may_change_is_read_again() -> None:
    """Writeable memory is never kept: the next copy sees what it holds then."""
    host = HostBlocks(BLOCK, 100 * BLOCK, allocate, lambda event: None)
    blocks = store(1, writeable=True)
    assert (host.fetch(blocks[0], FakeEvent(True)) == 0).all()
    blocks[0] = 9
    assert (host.fetch(blocks[0], FakeEvent(True)) == 9).all()
    assert host.kept_blocks == 0


def test_memory_that_cannot_be_pinned() -> None:
    """The refusal is remembered, the ring goes on serving, and it is not asked for again."""
    asked = []

    def refuse_after_the_ring(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        if len(asked) > 1:
            raise RuntimeError("no more locked memory")
        return allocate(nbytes)

    host = HostBlocks(BLOCK, 100 * BLOCK, refuse_after_the_ring, lambda event: None)
    blocks = store(3)
    for block in blocks:
        assert (host.fetch(block, FakeEvent(True))[0] == block[0]).all()
    assert host.refused == "no more locked memory"
    assert len(asked) == 2
    assert host.kept_blocks == 0


def test_a_budget_of_nothing_still_makes_one_buffer() -> None:
    """Copies must go somewhere."""
    assert HostBlocks(BLOCK, 0, allocate, lambda event: None).ring_buffers == 1


@pytest.mark.parametrize("pitch", [BLOCK, BLOCK + 64])
def test_slabs_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch, pitch: int) -> None:
    """Ring and slabs never take more than was given, though torch rounds up to powers of two."""
    monkeypatch.setattr("gpu_experts.cuda.feeder.SLAB_BYTES", 4 * BLOCK)
    taken = []

    def count(nbytes: int) -> torch.Tensor:
        taken.append(1 << (nbytes - 1).bit_length())
        return allocate(nbytes)

    budget = 40 * BLOCK + 1
    host = HostBlocks(pitch, budget, count, lambda event: None)
    blocks = np.zeros((60, pitch), np.uint8)
    blocks.flags.writeable = False
    for block in blocks:
        host.fetch(block, FakeEvent(True))
    assert sum(taken) <= budget
    assert len(taken) > 2
    # What is lost is less than one block of every allocation, and what no power of two fits.
    held = (host.kept_blocks + host.ring_buffers) * pitch
    assert held > budget - (len(taken) + 1) * pitch


def test_jobs_run_in_order_and_idle_tells() -> None:
    """One after the other in another thread; idle is false until the last is over."""
    feeder, seen, hold = Feeder("test"), [], threading.Event()
    assert feeder.idle
    feeder.submit(lambda: hold.wait(20) and seen.append(threading.current_thread().name), _never)
    for number in range(3):
        feeder.submit(lambda number=number: seen.append(number), _never)
    assert not feeder.idle
    hold.set()
    poll(lambda: feeder.idle, 20, "the feeder")
    assert seen == ["test", 0, 1, 2]
    feeder.close()


def test_closing_abandons_what_waits() -> None:
    """The job that runs ends, the others are told, and the thread is gone."""
    feeder, seen, began, hold = Feeder("test"), [], threading.Event(), threading.Event()

    def running() -> None:
        began.set()
        hold.wait(20)
        seen.append("ran")

    feeder.submit(running, _never)
    feeder.submit(_never, lambda: seen.append("abandoned"))
    began.wait(20)
    threading.Timer(0.02, hold.set).start()
    feeder.close(20)
    assert seen == ["ran", "abandoned"]
    feeder.close()


def _never() -> None:
    raise AssertionError("must not be called")


def test_polling() -> None:
    """Returns when it is over; otherwise a timeout by name."""
    left = iter([False, False, True])
    poll(lambda: next(left), 20, "it")
    with pytest.raises(DeviceTimeoutError, match=r"the thing did not finish in 0\.002 s"):
        poll(lambda: False, 0.002, "the thing")
