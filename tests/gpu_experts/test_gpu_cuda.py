"""The CUDA device's logic, over a runtime that stands for torch.cuda; see test_gpu_real.py."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import naive_gpu
from fake_cuda import FakeRuntime, is_before
from gpu_experts.cuda import kernels
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.cuda.events import CudaEvent
from gpu_experts.device import Device
from gpu_experts.errors import (
    DeviceError,
    DeviceFailedError,
    DeviceMemoryError,
    DeviceTimeoutError,
    ShapeError,
    SlotError,
)
from gpu_experts.events import poll
from hybrid.formats.block import Block
from naive_gpu import Copy, contents, small_layout
from random_experts import random_experts, random_routing
from stamped_slots import call, cuda_device, programs, run_stamps, stamp


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the stand-in there is no GPU for Triton to run on."""
    monkeypatch.setattr(kernels, "has_triton", lambda: False)


@pytest.mark.parametrize(("delay_s", "held"), [(0.0, True), (0.0, False), (0.0005, True)])
@pytest.mark.parametrize("pinned_blocks", [1, 100])
@given(program=programs())
@settings(max_examples=15, deadline=None)
def test_streams_order_every_hazard(
    delay_s: float, held: bool, pinned_blocks: int, program
) -> None:
    """Whoever enqueues it, main thread or feeder, each compute sees what it must see.

    With streams that get nowhere until all is called (``held``), whatever touches a slot is
    ordered behind what touched it before by streams and events alone.
    """
    runtime = FakeRuntime()
    runtime.delay_s = delay_s
    target = cuda_device(runtime, pinned_bytes=pinned_blocks * small_layout().block_bytes)
    if held:
        runtime.held |= {runtime.main, target._link}
    events: list = []
    outs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        for step in program:
            if isinstance(step, Copy):
                events.append(target.copy(_frozen_stamp(step.block), step.slot, "copy"))
            else:
                out, event = call(target, step.slots)
                events.append(event)
                outs.append((out, len(step.slots)))
        runtime.held.clear()
        for event in events:
            event.wait(20)
    seen = [[int(out[0, 0]) // 256**n % 256 for n in range(count)] for out, count in outs]
    assert seen == contents(program)
    for at, (step, event) in enumerate(zip(program, events, strict=True)):
        for before, earlier in zip(program[:at], events, strict=False):
            both_read = not isinstance(step, Copy) and not isinstance(before, Copy)
            if not both_read and naive_gpu._slots(step) & naive_gpu._slots(before):
                assert is_before(runtime.log, earlier, event) or not held, (before, step)
    target.close()


_BLOCKS: dict[int, np.ndarray] = {}


def _frozen_stamp(number: int) -> np.ndarray:
    """A read-only block, the same array each time, as a store gives them."""
    if number not in _BLOCKS:
        _BLOCKS[number] = stamp(number)
        _BLOCKS[number].flags.writeable = False
    return _BLOCKS[number]


def test_experts_run_from_slots_as_the_twin_says() -> None:
    """Real experts through copies, slots and the torch kernels, with tokens cut into passes."""
    shape = Block(hidden=64, intermediate=96, format="q4_0", bias=True)
    blocks, weights = random_experts(shape, 5)
    target: Device = CudaDevice(runtime=FakeRuntime())
    target.open(shape.with_stride(blocks.shape[1]), 5)
    for expert in range(5):
        target.copy(blocks[expert], 4 - expert, f"expert {expert}")
    ids, factors = random_routing(9, 5, 2)
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "tokens_a_pass", lambda layout, choices: 4)
        out = target.new_output(9)
        slots = (4 - ids).astype(np.int32)
        event = target.compute(torch.from_numpy(x), slots, factors, out, [], "all")
        cpu = np.full((9, 64), 0.5, np.float32)
        got = target.join(out, cpu, [event], torch.float32, 20)
    want = naive_gpu.experts(shape, weights, x, ids, factors) + 0.5
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    target.close()


def test_the_first_copy_of_a_block_goes_through_the_thread_and_later_ones_do_not() -> None:
    """Once a block has its pinned copy and the thread is idle, the caller enqueues it itself."""
    runtime = FakeRuntime()
    target = cuda_device(runtime)
    target.copy(_frozen_stamp(5), 0, "first").wait(20)
    poll(lambda: target._feeder.idle, 20, "the feeder")
    assert runtime.threads == {"copies"}
    runtime.threads.clear()
    again = target.copy(_frozen_stamp(5), 1, "again")
    assert again.issued
    assert runtime.threads == {threading.current_thread().name}
    target.close()


def test_residents_are_computed_without_waiting_for_copies_on_their_way() -> None:
    """A compute of ready slots is enqueued at once, beside a copy that the thread still fills."""
    runtime = FakeRuntime()
    target = cuda_device(runtime, pinned_bytes=0)
    target.copy(stamp(1), 0, "resident").wait(20)
    target.to_host()
    hold = threading.Event()
    target._feeder.submit(lambda: hold.wait(20), lambda: None)
    copy = target.copy(stamp(2), 1, "on its way")
    _, ready = call(target, [0], "resident")
    _, waiting = call(target, [1], "copied")
    _, behind = call(target, [0], "behind it")
    assert ready.issued
    assert not copy.issued
    assert not waiting.issued
    assert not behind.issued, "computes keep the order of the calls"
    hold.set()
    for event in (copy, waiting, behind):
        event.wait(20)
    target.close()


def test_join_waits_for_the_enqueueing_and_not_for_the_device() -> None:
    """The host goes on while the stream is busy; the model's stream waits for the link."""
    runtime = FakeRuntime()
    target = cuda_device(runtime)
    copy = target.copy(stamp(1), 0, "copy")
    out, event = call(target, [0])
    copy.wait(20)
    event.wait(20)
    runtime.held |= {runtime.main, target._link}
    prefetch = target.copy(stamp(1), 1, "prefetch")
    out, event = call(target, [0])
    joined = target.join(out, None, [event, prefetch], torch.float16, 20)
    assert joined.dtype == torch.float16
    assert not event.done()
    assert (runtime.main, "wait", prefetch.end) in runtime.log
    runtime.held.clear()
    target.close()


def test_to_host_waits_by_polling_and_gives_up() -> None:
    """A stream that gets nowhere is a timeout and not a hang; what follows meanwhile is kept."""
    runtime = FakeRuntime()
    target = cuda_device(runtime, timeout_s=0.02)
    x = torch.arange(4.0)
    called = []
    (host,) = target.to_host(x, meanwhile=lambda: called.append(1))
    assert host.tolist() == [0, 1, 2, 3]
    assert called == [1]
    runtime.held.add(runtime.main)
    with pytest.raises(DeviceTimeoutError, match="the device's work so far did not finish"):
        target.to_host(x)
    runtime.held.clear()
    target.close()


def test_a_stall_times_out_wherever_it_is_waited_for() -> None:
    """An event that never ends: wait says what and how long; close() comes back."""
    runtime = FakeRuntime()
    target = cuda_device(runtime, timeout_s=0.02)
    runtime.held.add(target._link)
    event = target.copy(stamp(1), 0, "layer 1: expert 2 copied")
    with pytest.raises(DeviceTimeoutError, match="layer 1: expert 2 copied did not finish"):
        event.wait(0.01)
    assert event.span() is None
    target.close()


def test_a_full_ring_that_does_not_move_fails_the_copies_behind_it() -> None:
    """When no buffer comes free in time, the copy fails by name, and so does what needs it."""
    runtime = FakeRuntime()
    target = cuda_device(runtime, pinned_bytes=0, timeout_s=0.02)
    runtime.held.add(target._link)
    target.copy(stamp(1), 0, "stuck")
    second = target.copy(stamp(1), 1, "second")
    out, event = call(target, [1], "needs it")
    with pytest.raises(DeviceTimeoutError, match="stuck did not finish"):
        second.wait(20)
    with pytest.raises(DeviceFailedError, match="needs it failed: stuck did not finish"):
        target.join(out, None, [event], torch.float32, 20)
    runtime.held.clear()
    target.close()


def test_what_the_gpu_reports_late_is_a_failure() -> None:
    """An error that a query brings up is the event's failure, by name."""
    runtime = FakeRuntime()
    target = cuda_device(runtime)
    target.copy(stamp(1), 0, "copy").wait(20)
    _, event = call(target, [0], "kernel")
    runtime.broken = True
    with pytest.raises(DeviceFailedError, match="kernel failed: CUDA error: an illegal memory"):
        event.wait(20)
    assert event.done()
    with pytest.raises(DeviceFailedError, match="bringing results to the host failed"):
        target.to_host(torch.zeros(1))
    target.close()


def test_memory_that_runs_out_at_once_or_in_the_thread() -> None:
    """Out of memory is its own error, with the free bytes, from whichever thread it comes."""
    runtime = FakeRuntime()
    target = cuda_device(runtime)
    target.copy(stamp(1), 0, "copy").wait(20)
    runtime.refuses_memory = True
    with pytest.raises(DeviceMemoryError, match=r"no memory on fake \(cuda:0\) for kernel") as e:
        call(target, [0], "kernel")
    assert e.value.free_bytes == 1 << 19
    with pytest.raises(DeviceMemoryError, match="2 slots of 4096 bytes: 8192 bytes asked for"):
        target.open(small_layout(), 2)
    with pytest.raises(DeviceFailedError, match="no slots"):
        target.new_output(1)
    runtime.refuses_memory = False
    target.open(small_layout(), 2)
    hold = threading.Event()
    target._feeder.submit(lambda: hold.wait(20), lambda: None)
    target.copy(stamp(1), 0, "copy")
    out, event = call(target, [0], "kernel")
    runtime.refuses_memory = True
    hold.set()
    with pytest.raises(DeviceError):
        target.join(out, None, [event], torch.float32, 20)
    runtime.refuses_memory = False
    target.to_host(torch.zeros(1))
    target.close()


def test_a_refused_pin_is_said_and_copies_go_on() -> None:
    """Without pinned memory everything still works, and one note says why it is slow."""
    runtime = FakeRuntime()
    runtime.refuses_to_pin = True
    target = cuda_device(runtime)
    target.copy(stamp(7), 0, "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        out, event = call(target, [0])
        assert target.join(out, None, [event], torch.float32, 20)[0, 0] == 7
    pins = [note for note in target.notes if "pin" in note.reason]
    assert len(pins) == 1
    assert pins[0].reason == "the system refused to pin more: CUDA error: out of memory"
    assert "ulimit" in pins[0].remedy
    target.close()


def test_a_missing_triton_is_said_once() -> None:
    """Opening twice does not repeat the note."""
    target = cuda_device()
    target.open(small_layout(), 2)
    assert [note.what for note in target.notes] == ["experts on the GPU in plain torch"]
    target.close()


def test_closing_fails_what_waits_and_pinned_copies_outlive_opening_again() -> None:
    """After open() with fewer slots the blocks need not be read again; after close() they must."""
    target = cuda_device()
    target.copy(_frozen_stamp(5), 0, "copy").wait(20)
    host = target._host
    target.open(small_layout(), 2)
    assert target._host is host
    assert host.kept_blocks == 1
    hold = threading.Event()
    target._feeder.submit(lambda: hold.wait(20), lambda: None)
    waiting = target.copy(stamp(1), 0, "waiting")
    threading.Timer(0.02, hold.set).start()
    target.close()
    with pytest.raises(DeviceFailedError, match="waiting failed: the device was closed"):
        waiting.wait(20)
    with pytest.raises(DeviceFailedError, match="no slots"):
        target.copy(stamp(1), 0, "copy")
    target.close()


def test_spans_lie_on_the_hosts_clock() -> None:
    """Times between events are mapped through a reference event; they stay in order."""
    target = cuda_device()
    before = time.perf_counter()
    copy = target.copy(stamp(1), 0, "copy")
    copy.wait(20)
    after = time.perf_counter()
    start, end = copy.span()
    # The reference itself is known to the few microseconds that its poll takes.
    assert before - 0.005 <= start <= end <= after + 0.005
    target.close()


def test_an_old_reference_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 milliseconds lose precision over hours: to_host renews the reference."""
    target = cuda_device()
    old = target._anchor
    target.to_host(torch.zeros(1))
    assert target._anchor is old
    monkeypatch.setattr("gpu_experts.cuda.device.ANCHOR_S", -1.0)
    target.to_host(torch.zeros(1))
    assert target._anchor is not old
    target.close()


def test_bad_arguments_are_named() -> None:
    """The same checks as on every device, and that tensors are where the device is."""
    target = cuda_device()
    ids, ones = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    with pytest.raises(SlotError, match="no slot 3"):
        target.copy(stamp(0), 3, "copy")
    with pytest.raises(SlotError, match=r"nothing was copied into slots \[0\]"):
        call(target, [0])
    x, out = torch.zeros(1, 4, device="meta"), target.new_output(1)
    with pytest.raises(ShapeError, match="x is on meta, the device is cpu"):
        target.compute(x, ids, ones, out, [], "compute")
    target.close()


def test_no_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA, or with another number of GPUs, the error says what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceFailedError, match="no CUDA device") as caught:
        CudaDevice()
    assert "built without CUDA" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceFailedError, match="no CUDA device 3: this machine has 1"):
        CudaDevice(3)


def test_an_event_that_was_not_enqueued() -> None:
    """Neither done nor with a span, and waiting for its enqueueing has an end."""
    runtime = FakeRuntime()
    event = CudaEvent("it", runtime, cuda_device(runtime)._anchor)
    assert not event.done()
    assert event.span() is None
    with pytest.raises(DeviceTimeoutError, match="it did not finish"):
        event.wait_issued(0.001)
