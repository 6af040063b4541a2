"""The laws of the device protocol, on the emulated device: order, capacity, faults, results."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cpu_experts.ffn import run_experts
from gpu_experts.device import Device
from gpu_experts.emulated.device import EmulatedDevice
from gpu_experts.errors import (
    ArgumentError,
    DeviceFailedError,
    DeviceMemoryError,
    DeviceTimeoutError,
    ShapeError,
    SlotError,
)
from hybrid.formats.block import Block
from naive_gpu import Copy, contents, small_layout
from random_experts import random_experts, random_routing
from stamped_slots import SLOTS, add_stamps, call, programs, stamp

MODES = ["exact", "timing"]


def device(mode: str = "exact", **options) -> EmulatedDevice:
    """An open device of three slots."""
    made = EmulatedDevice(SLOTS * 4096, mode=mode, run=add_stamps, **options)
    made.open(small_layout(), SLOTS)
    return made


def run_program(target: Device, program) -> list[list[int]]:
    """Call everything without waiting, join, and return which blocks each compute saw."""
    outs, events = [], []
    for at, step in enumerate(program):
        if isinstance(step, Copy):
            events.append(target.copy(stamp(step.block), step.slot, f"copy {at}"))
        else:
            out, event = call(target, step.slots, f"compute {at}")
            outs.append((out, len(step.slots)))
            events.append(event)
    for event in events:
        event.wait(20)
    return [[int(out[0, 0]) // 256**n % 256 for n in range(count)] for out, count in outs]


@pytest.mark.parametrize(
    "speeds",
    [
        {},
        {"link_latency_s": 0.003},
        {"launch_s": 0.003},
        {"link_latency_s": 0.001, "expert_s": lambda load: 0.001},
    ],
    ids=["as fast as it goes", "slow link", "slow compute", "both slow"],
)
@given(program=programs())
@settings(max_examples=12, deadline=None)
def test_slots_behave_as_if_everything_ran_in_order(speeds, program) -> None:
    """Whichever lane lags behind, a compute sees the copies called before it and no later one."""
    target = device(**speeds)
    try:
        assert run_program(target, program) == contents(program)
    finally:
        target.close()


def test_a_copy_waits_for_the_compute_that_reads_the_slot() -> None:
    """With a reader held up, the next copy into its slot does not start, another's does."""
    hold = threading.Event()

    def run(x, slot_ids, weights, slots, layout, out) -> None:
        hold.wait(20)
        add_stamps(x, slot_ids, weights, slots, layout, out)

    target = EmulatedDevice(SLOTS * 4096, run=run)
    target.open(small_layout(), SLOTS)
    target.copy(stamp(7), 0, "first")
    out, reading = call(target, [0])
    elsewhere = target.copy(stamp(8), 1, "elsewhere")
    second = target.copy(stamp(9), 0, "second")
    elsewhere.wait(20)
    assert not reading.done()
    assert not second.done()
    hold.set()
    reading.wait(20)
    second.wait(20)
    assert out[0, 0] == 7
    target.close()


def test_exact_results_are_the_cpu_paths_bit_for_bit() -> None:
    """Experts run from slots, in other places than in the store, give the CPU's very bits."""
    shape = Block(hidden=64, intermediate=96, format="q4_0")
    blocks, _ = random_experts(shape, 5)
    ids, weights = random_routing(9, 5, 2)
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)

    def run(x, slot_ids, weights, slots, layout, out) -> None:
        run_experts(x, slot_ids, weights, slots, shape, out)

    target = EmulatedDevice(5 * blocks.shape[1], run=run)

    target.open(shape.with_stride(blocks.shape[1]), 5)
    events = [target.copy(blocks[expert], 4 - expert, f"expert {expert}") for expert in range(5)]
    out = target.new_output(9)
    slots = (4 - ids).astype(np.int32)
    event = target.compute(torch.from_numpy(x), slots, weights, out, events, "all")
    got = target.join(out, None, [event], torch.float32, 20)
    want = np.zeros_like(x)
    # Sorted by slot, the sum over a token's experts runs the other way round.
    run_experts(x, slots, weights, np.ascontiguousarray(blocks[::-1]), shape, want)
    np.testing.assert_array_equal(got.numpy(), want)
    target.close()


def test_arguments_of_a_compute_are_free_when_it_returns() -> None:
    """Slot ids and weights may be overwritten at once, while the lane is still busy."""
    target = device(link_latency_s=0.02)
    target.copy(stamp(5), 0, "copy")
    ids, weights = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    out = target.new_output(1)
    event = target.compute(torch.zeros(1, 4), ids, weights, out, [], "compute")
    ids[:], weights[:] = 2, 100
    event.wait(20)
    assert out[0, 0] == 5
    target.close()


def test_join_adds_the_cpus_share_in_the_models_type() -> None:
    """out + cpu_out, rounded once; without a CPU share, out alone."""
    target = device()
    target.copy(stamp(3), 1, "copy")
    out, event = call(target, [1])
    cpu = np.full((1, 4), 0.25, np.float32)
    joined = target.join(out, cpu, [event], torch.bfloat16, 20)
    cpu[:] = 9
    assert joined.dtype == torch.bfloat16
    assert joined.tolist() == [[3.25] * 4]
    assert target.join(out, None, [], torch.float32, 20).tolist() == [[3.0] * 4]
    target.close()


def test_to_host_waits_for_computes_but_not_for_what_is_enqueued_meanwhile() -> None:
    """An output fetched without a join is complete; later work does not hold it up."""
    target = device(launch_s=0.01)
    target.copy(stamp(3), 1, "copy")
    out, event = call(target, [1])
    target.copy(stamp(4), 2, "copy")
    later = []
    (fetched,) = target.to_host(out, meanwhile=lambda: later.append(call(target, [2])))
    assert event.done()
    assert fetched.tolist() == [[3.0] * 4]
    later[0][1].wait(20)
    target.close()


def test_lists_are_one_tokens_slots() -> None:
    """A single token's slots and weights may be lists: the same sum as from arrays."""
    target = device()
    for slot in range(SLOTS):
        target.copy(stamp(slot + 1), slot, "copy")
    from_arrays, first = call(target, [2, 0])
    from_lists = target.new_output(1)
    second = target.compute(torch.zeros(1, 4), [2, 0], [1.0, 256.0], from_lists, [], "lists")
    for event in (first, second):
        event.wait(20)
    assert from_lists.tolist() == from_arrays.tolist() == [[3.0 + 256.0] * 4]
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_capacity_is_enforced_and_reported(mode: str) -> None:
    """Slots beyond the capacity are refused with both numbers; opening again frees the old."""
    target = EmulatedDevice(SLOTS * 4096 + 100, mode=mode, run=add_stamps)
    assert target.memory() == (SLOTS * 4096 + 100, SLOTS * 4096 + 100)
    with pytest.raises(DeviceMemoryError, match="4 slots take 16384 bytes") as caught:
        target.open(small_layout(), 4)
    assert (caught.value.asked_bytes, caught.value.free_bytes) == (16384, 12388)
    assert caught.value.hint == "ask for at most 3 slots"
    for _ in range(2):
        target.open(small_layout(), 3)
        assert target.memory().free_bytes == 100
    target.close()
    target.close()
    assert target.memory().free_bytes == SLOTS * 4096 + 100


@pytest.mark.parametrize("mode", MODES)
def test_opening_again_loses_what_the_slots_held(mode: str) -> None:
    """After open() nothing is in any slot, and reading one is an error."""
    target = device(mode)
    target.copy(stamp(1), 0, "copy")
    target.open(small_layout(), 2)
    with pytest.raises(SlotError, match=r"nothing was copied into slots \[0\]"):
        call(target, [0])
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_that_fails(mode: str) -> None:
    """Its event fails, so does what needs it, and the slot serves again after another copy."""
    target = device(mode)
    target.fail("copy", after=1)
    target.copy(stamp(1), 0, "good").wait(20)
    bad = target.copy(stamp(2), 1, "layer 3: expert 7 copied")
    out, event = call(target, [1], "needs it")
    for what in (bad, event):
        with pytest.raises(DeviceFailedError, match="layer 3: expert 7 copied failed: injected"):
            what.wait(20)
        assert what.done()
        assert what.span() is None
    with pytest.raises(DeviceFailedError, match="needs it failed"):
        target.join(out, None, [event], torch.float32, 20)
    target.copy(stamp(2), 1, "again")
    out, event = call(target, [1])
    event.wait(20)
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_compute_that_fails(mode: str) -> None:
    """Its event and join fail; the slot it read can be written, and the next compute runs."""
    target = device(mode)
    target.copy(stamp(1), 0, "copy")
    target.fail("compute")
    out, event = call(target, [0], "kernel")
    with pytest.raises(DeviceFailedError, match="kernel failed: injected"):
        target.join(out, None, [event], torch.float32, 20)
    target.copy(stamp(2), 0, "over it").wait(20)
    call(target, [0])[1].wait(20)
    target.to_host(torch.zeros(1))
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out(mode: str) -> None:
    """Slots, outputs and computes are refused with a typed error; nothing was enqueued."""
    target = device(mode)
    target.copy(stamp(1), 0, "copy")
    target.fail("memory")
    with pytest.raises(DeviceMemoryError, match="an output"):
        target.new_output(5)
    target.fail("memory", after=1)
    with pytest.raises(DeviceMemoryError, match="the kernel"):
        call(target, [0], "the kernel")
    call(target, [0])[1].wait(20)
    target.fail("memory")
    with pytest.raises(DeviceMemoryError, match="3 slots"):
        target.open(small_layout(), 3)
    with pytest.raises(DeviceFailedError, match="no slots"):
        target.new_output(1)
    target.open(small_layout(), 2)
    target.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", ["copy", "compute"])
def test_a_stall_times_out_and_closing_ends_it(mode: str, lane: str) -> None:
    """What never ends is a timeout by name, wherever it is waited for; close() does not hang."""
    target = device(mode, timeout_s=0.02)
    if lane == "compute":
        target.copy(stamp(1), 0, "copy").wait(20)
    target.fail("stall")
    if lane == "copy":
        target.copy(stamp(1), 0, "copy")
    out, event = call(target, [0], "layer 2: expert 5")
    with pytest.raises(
        DeviceTimeoutError, match=r"layer 2: expert 5 did not finish in 0.01 s"
    ) as e:
        event.wait(0.01)
    assert "suspended" in str(e.value.hint)
    with pytest.raises(DeviceTimeoutError):
        target.join(out, None, [event], torch.float32, 0.01)
    with pytest.raises(DeviceTimeoutError):
        target.to_host(out)
    assert not event.done()
    target.close()
    if mode == "exact":
        with pytest.raises(DeviceFailedError, match="closed"):
            event.wait(20)


def test_an_exception_in_the_computation_is_the_devices_failure() -> None:
    """Whatever run() raises arrives as one typed error with its cause."""

    def run(*arguments) -> None:
        raise ZeroDivisionError("what it said")

    target = EmulatedDevice(4096, run=run)
    target.open(small_layout(), 1)
    target.copy(stamp(1), 0, "copy")
    _, event = call(target, [0], "kernel")
    with pytest.raises(DeviceFailedError, match="ZeroDivisionError: what it said") as caught:
        event.wait(20)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    target.close()


def test_a_wait_that_was_broken_off_leaves_the_device_usable() -> None:
    """Ctrl-C in a wait: the lanes go on, and the next calls get right results."""
    target = device(link_latency_s=0.02)
    target.copy(stamp(1), 0, "copy")
    _, event = call(target, [0])
    with pytest.raises(KeyboardInterrupt):
        target.to_host(meanwhile=_interrupt)
    target.copy(stamp(2), 0, "next")
    out, event = call(target, [0])
    assert target.join(out, None, [event], torch.float32, 20)[0, 0] == 2
    target.close()


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", MODES)
def test_spans_tell_when_it_ran(mode: str) -> None:
    """Start and end lie on time.perf_counter's scale, in order; unknown while it runs."""
    target = device(mode, link_latency_s=0.01, launch_s=0.005)
    before = time.perf_counter()
    copy = target.copy(stamp(1), 0, "copy")
    assert copy.span() is None
    assert copy.what == "copy"
    _, compute = call(target, [0])
    compute.wait(20)
    after = time.perf_counter()
    (copied, arrived), (began, ended) = copy.span(), compute.span()
    assert before <= copied <= arrived <= began <= ended <= after
    assert arrived - copied >= 0.0099
    assert ended - began >= 0.0049
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_device_says_what_it_is(mode: str) -> None:
    """Name, meaning of its results, place of tensors; timing mode warns of its outputs."""
    target: Device = device(mode)
    assert target.name == f"emulated, {mode}"
    assert target.torch_device == torch.device("cpu")
    assert target.meaningful == (mode == "exact")
    assert [note.what for note in target.notes] == (
        [] if mode == "exact" else ["the text is meaningless"]
    )
    target.close()


@pytest.mark.parametrize("mode", MODES)
def test_bad_arguments_are_named(mode: str) -> None:
    """Wrong slots, blocks, shapes and types each give an error with both values."""
    target = device(mode)
    x, ones = torch.zeros(1, 4), np.ones((1, 1), np.float32)
    zero, out = np.zeros((1, 1), np.int32), target.new_output(1)
    with pytest.raises(SlotError, match="no slot 3 on a device with 3 slots"):
        target.copy(stamp(0), 3, "copy")
    with pytest.raises(ShapeError, match="without a stride has no slots"):
        target.open(Block(hidden=4, intermediate=4, format="q4_0"), 1)
    with pytest.raises(ShapeError, match=r"a block takes \d+ bytes, got 5"):
        target.copy(stamp(0)[:5], 0, "copy")
    with pytest.raises(ShapeError, match="contiguous uint8"):
        target.copy(np.zeros(9999, np.float32), 0, "copy")
    with pytest.raises(SlotError, match="slot ids from 3 to 3"):
        target.compute(x, zero + 3, ones, out, [], "compute")
    with pytest.raises(SlotError, match="slot ids from -2 to -2"):
        target.compute(x, zero - 2, ones, out, [], "compute")
    with pytest.raises(ShapeError, match=r"x is torch.float32 \[1, 5\]"):
        target.compute(torch.zeros(1, 5), zero, ones, out, [], "compute")
    with pytest.raises(ShapeError, match=r"slot_ids are int32 \[2, 1\] for 1 tokens"):
        target.compute(x, np.zeros((2, 1), np.int32), ones, out, [], "compute")
    with pytest.raises(ShapeError, match="routing_weights are float64"):
        target.compute(x, zero, ones.astype(float), out, [], "compute")
    with pytest.raises(ShapeError, match=r"out is torch\.float16"):
        target.compute(x, zero, ones, out.half(), [], "compute")
    with pytest.raises(ShapeError, match=r"\[0, 0\] and 2 weights for 1 tokens"):
        target.compute(x, [0, 0], [1.0, 1.0], out, [], "compute")
    with pytest.raises(ShapeError, match=r"\[0\] and 1 weights for 2 tokens"):
        target.compute(torch.zeros(2, 4), [0], [1.0], target.new_output(2), [], "compute")
    target.close()
    with pytest.raises(DeviceFailedError, match="no slots"):
        target.copy(stamp(0), 0, "copy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "needs run"),
        ({"mode": "timing", "link_bytes_per_s": 0.0}, "rates"),
        ({"mode": "timing", "launch_s": -1.0}, "negative"),
    ],
)
def test_impossible_devices_are_refused(options, message: str) -> None:
    """A device that cannot compute, or that is faster than time, is an error at once."""
    with pytest.raises(ArgumentError, match=message):
        EmulatedDevice(4096, **options)


def test_a_device_that_is_dropped_ends_its_threads() -> None:
    """Without close(), garbage collection ends the lanes; closing twice is harmless."""
    names = {"link", "compute"}
    before = {thread for thread in threading.enumerate() if thread.name in names}
    target = device()
    mine = {thread for thread in threading.enumerate() if thread.name in names} - before
    assert len(mine) == 2
    del target
    for thread in mine:
        thread.join(20)
        assert not thread.is_alive()
