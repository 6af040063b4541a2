"""The CUDA device on a real GPU: what its stand-in cannot tell of streams, kernels and memory."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import naive_gpu
from cpu_experts.experts import ExpertShape
from gpu_experts import kernels
from gpu_experts.cuda import CudaDevice
from gpu_experts.errors import DeviceMemoryError
from gpu_experts.layout import BlockLayout
from naive_gpu import Copy, contents, small_layout
from test_device import SLOTS, programs, stamp
from test_ffn import _layer, _routing
from test_gpu_cuda import run_stamps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@given(program=programs())
@settings(max_examples=20, deadline=None)
def test_slots_behave_as_if_everything_ran_in_order_on_a_gpu(program) -> None:
    """The emulated device's law, on the real one: stamps read by real kernels on real streams."""
    target = CudaDevice(pinned_bytes=3 * small_layout().block_bytes)
    target.open(small_layout(), SLOTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
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
    shape = ExpertShape(hidden=256, intermediate=192, format=fmt)
    blocks, weights = _layer(shape, 6)
    target = CudaDevice()
    target.open(BlockLayout.of(shape, blocks.shape[1]), 6)
    before = time.perf_counter()
    copies = [target.copy(blocks[expert], expert, f"expert {expert}") for expert in range(6)]
    _, ids, factors = _routing(tokens, 6, 3)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        event = target.compute(x, ids, ones, out, [], "compute")
        (got,) = target.to_host(target.join(out, None, [event], torch.float32, 20))
    assert got[0, 0] == 7
    target.close()


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        event = target.compute(x, ids, ones, out, [], "compute")
        (got,) = target.to_host(target.join(out, None, [event], torch.float32, 20))
    assert busy.query()
    assert got[0, 0] == 2
    target.close()
