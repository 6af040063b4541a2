"""The CUDA device on a real GPU: what its stand-in cannot tell of streams, kernels and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import naive_gpu
from gpu_experts.cuda import kernels
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.errors import DeviceMemoryError
from hybrid.formats.block import Block
from naive_gpu import Copy, contents, small_layout
from random_experts import random_experts, random_routing
from stamped_slots import SLOTS, programs, run_stamps, stamp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def _stamps() -> Iterator[None]:
    """Kernels of plain torch that add what slots hold, instead of experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "has_triton", lambda: False)
        patch.setattr(kernels, "run", run_stamps)
        yield


@pytest.mark.usefixtures("_stamps")
@given(program=programs())
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_slots_behave_as_if_everything_ran_in_order_on_a_gpu(program) -> None:
    """The emulated device's law, on the real one: stamps read by real kernels on real streams."""
    target = CudaDevice(pinned_bytes=3 * small_layout().block_bytes)
    target.open(small_layout(), SLOTS)
    outs = []
    for step in program:
        if isinstance(step, Copy):
            target.copy(stamp(step.block), step.slot, "copy")
            continue
        out, ids = target.new_output(1), np.array([step.slots], np.int32)
        weights = (256.0 ** np.arange(ids.size, dtype=np.float32))[None]
        x = torch.zeros(1, 4, device=target.torch_device)
        event = target.compute(x, ids, weights, out, [], "compute")
        outs.append((target.join(out, None, [event], torch.float32, 20), ids.size))
    seen = [
        [int(out[0, 0]) // 256**n % 256 for n in range(count)]
        for out, count in ((target.to_host(out)[0], count) for out, count in outs)
    ]
    assert seen == contents(program)
    target.close()


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
def test_experts_on_a_gpu(tokens: int, fmt: str) -> None:
    """Copies, kernels and join on the GPU agree with the twin; spans are plausible."""
    shape = Block(hidden=256, intermediate=192, format=fmt)
    blocks, weights = random_experts(shape, 6)
    target = CudaDevice()
    target.open(shape.with_stride(blocks.shape[1]), 6)
    before = time.perf_counter()
    copies = [target.copy(blocks[expert], expert, f"expert {expert}") for expert in range(6)]
    ids, factors = random_routing(tokens, 6, 3)
    x = np.random.default_rng(0).standard_normal((tokens, 256)).astype(np.float32)
    hidden = torch.from_numpy(x).to(target.torch_device, torch.bfloat16)
    out = target.new_output(tokens)
    event = target.compute(hidden, ids.astype(np.int32), factors, out, copies, "all")
    cpu = np.full((tokens, 256), 0.5, np.float32)
    joined = target.join(out, cpu, [event], torch.float32, 60)
    (got,) = target.to_host(joined)
    want = 0.5 + naive_gpu.experts(shape, weights, hidden.float().cpu().numpy(), ids, factors)
    assert np.abs(got - want).max() <= 1.5e-2 * np.abs(want).max()
    (copied, arrived), (began, ended) = copies[-1].span(), event.span()
    assert before - 0.001 <= copied <= arrived <= began <= ended <= time.perf_counter() + 0.001
    target.close()


def test_more_slots_than_the_gpu_has_memory_for() -> None:
    """The refusal says both numbers, and a smaller number of slots works afterwards."""
    target = CudaDevice()
    total = target.memory().total_bytes
    with pytest.raises(DeviceMemoryError) as caught:
        target.open(small_layout(1 << 20), 2 * total >> 20)
    assert caught.value.asked_bytes > caught.value.free_bytes
    target.open(small_layout(), 4)
    target.close()


@pytest.mark.usefixtures("_stamps")
def test_memory_that_runs_out_between_two_steps() -> None:
    """An output that cannot be had is refused with both numbers; what was there goes on."""
    target = CudaDevice()
    target.open(small_layout(), 2)
    target.copy(stamp(7), 0, "copy").wait(20)
    tokens = target.memory().total_bytes // 8  # of 16 bytes each: twice what there is
    with pytest.raises(DeviceMemoryError, match=r"no memory on .* for an output") as caught:
        target.new_output(tokens)
    assert caught.value.asked_bytes > target.memory().total_bytes
    x = torch.zeros(1, 4, device=target.torch_device)
    ids, ones = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    out = target.new_output(1)
    event = target.compute(x, ids, ones, out, [], "compute")
    (got,) = target.to_host(target.join(out, None, [event], torch.float32, 20))
    assert got[0, 0] == 7
    target.close()


@pytest.mark.usefixtures("_stamps")
def test_copies_do_not_wait_for_the_models_stream() -> None:
    """A copy arrives while the stream that computes is busy; what reads the slot comes after."""
    target = CudaDevice()
    target.open(small_layout(), 1)
    target.copy(stamp(1), 0, "first").wait(20)  # what is made once is made
    torch.cuda._sleep(1_000_000_000)  # about half a second
    busy = torch.cuda.Event()
    busy.record()
    target.copy(stamp(2), 0, "beside").wait(20)
    assert not busy.query()
    x = torch.zeros(1, 4, device=target.torch_device)
    ids, ones = np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    out = target.new_output(1)
    event = target.compute(x, ids, ones, out, [], "compute")
    (got,) = target.to_host(target.join(out, None, [event], torch.float32, 20))
    assert busy.query()
    assert got[0, 0] == 2
    target.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
def test_triton_is_what_runs(fmt: str, dtype: torch.dtype) -> None:
    """Where it is installed, its kernels compile, agree with plain torch, and are used."""
    if not kernels.has_triton():
        pytest.skip("needs triton")
    shape = Block(hidden=256, intermediate=192, format=fmt, bias=True)
    target, layout = CudaDevice(), shape.with_stride(1 << 18)
    target.open(layout, 1)
    assert target._implementation(layout, target._runtime.dtype) == "triton", target.notes
    assert target._implementation(layout, dtype) == "triton", target.notes
    target.close()


def test_a_small_call_does_not_wait_for_the_link() -> None:
    """A token's table and the CPU's share do not queue behind large copies of experts."""
    if not kernels.has_triton():
        pytest.skip("needs triton")
    shape = Block(hidden=4096, intermediate=14336, format="q8_0")
    layout = shape.with_stride(shape.block_bytes)
    target = CudaDevice(pinned_bytes=4 << 30)
    target.open(layout, 9)
    blocks = np.zeros((9, layout.block_bytes), np.uint8)
    blocks.flags.writeable = False
    for _ in range(2):  # the first time they get their pinned copies
        for slot, block in enumerate(blocks):
            arrived = target.copy(block, slot, "copy")
        arrived.wait(60)
    x = torch.zeros(1, 4096, device=target.torch_device, dtype=target._runtime.dtype)
    for busy in (False, True):
        copies = [target.copy(block, 1 + n, "copy") for n, block in enumerate(blocks[1:]) if busy]
        out = target.new_output(1)
        event = target.compute(x, [0], [1.0], out, (), "compute")
        target.to_host(target.join(out, np.ones((1, 4096), np.float32), [event], x.dtype, 20))
        assert not copies or not copies[-1].done(), "it waited for eight experts"
    copies[-1].wait(60)
    target.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    """Streams, events, pinned memory and kernels are the chosen GPU's, in both threads."""
    shape = Block(hidden=256, intermediate=192, format="q4_0")
    blocks, weights = random_experts(shape, 4)
    target = CudaDevice(1)
    target.open(shape.with_stride(blocks.shape[1]), 4)
    for expert in range(4):
        target.copy(blocks[expert], expert, "copy")
    ids, factors = random_routing(1, 4, 2)
    x = torch.ones(1, 256, device="cuda:1")
    out = target.new_output(1)
    event = target.compute(x, ids.astype(np.int32), factors, out, (), "compute")
    (got,) = target.to_host(target.join(out, None, [event], torch.float32, 60))
    want = naive_gpu.experts(shape, weights, np.ones((1, 256), np.float32), ids, factors)
    assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max()
    assert torch.cuda.current_device() == 0
    target.close()
