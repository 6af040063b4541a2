"""The CUDA device over streams that are asynchronous and unkind: whatever is not ordered races."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demo_on_cuda import ROUNDING, demo, distance, logits, placed, prompts
from gpu_experts.cuda import kernels
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.events import poll
from hybrid.ask.names import find_hardware
from hybrid.loading import load_fast_model
from hybrid.model import Model
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import Budget
from hybrid.sharing.executor import Executor
from hybrid.sharing.placement import place_model
from naive_gpu import Compute, Copy, contents, small_layout
from shared_demo import PROMPT
from shared_layers import EXPERTS, LAYERS, on_cpu, random_layers, random_step, shared_executor
from stamped_slots import SLOTS, programs, run_stamps, stamp
from strict_cuda import DEVICE, StrictRuntime, StrictStream
from tiny_families import causal_families, tiny_config

#: The laziest order, and any that is allowed.
SEEDS = st.none() | st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU for Triton to run on."""
    monkeypatch.setattr(kernels, "has_triton", lambda: False)


def lend_tables(patch: pytest.MonkeyPatch, runtime: StrictRuntime) -> None:
    """Let kernels be what Triton's are: functions of memory that read pinned tables in place."""

    def run(x, routing, table, slots, layout, out, implementation) -> None:
        assert implementation == "triton"

        def kernel(out, table, slots) -> None:
            run_stamps(None, routing, table, slots, layout, out, implementation)

        runtime.launch(kernel, out, table, slots)

    def add_host(out, host, total) -> None:
        runtime.launch(lambda out, host, total: total.copy_(out + host), out, host, total)

    patch.setattr(kernels, "choose", lambda layout: ("triton", None))
    patch.setattr(kernels, "probe", lambda *arguments: None)
    patch.setattr(kernels, "run", run)
    patch.setattr(kernels, "add_host", add_host)


def seen_by(runtime: StrictRuntime, program, pinned_blocks: int) -> list[list[int]]:
    """Call everything without waiting, join, and return which blocks each compute saw."""
    with runtime.here():
        target = CudaDevice(
            runtime=runtime, pinned_bytes=pinned_blocks * small_layout().block_bytes
        )
        target.open(small_layout(), SLOTS)
        joined = []
        for step in program:
            if isinstance(step, Copy):
                target.copy(stamp(step.block), step.slot, "copy")
                continue
            out, x = target.new_output(1), torch.zeros(1, 4, device=DEVICE)
            weights = (256.0 ** np.arange(len(step.slots), dtype=np.float32))[None]
            event = target.compute(x, np.array([step.slots], np.int32), weights, out, (), "compute")
            share = np.full((1, 4), 0.25, np.float32)
            total = target.join(out, share, [event], torch.float32, 20)
            share[:] = 9  # the device has taken what it needs
            joined.append((total, len(step.slots)))
        seen = [(target.to_host(total)[0], count) for total, count in joined]
        target.close()
    runtime.finish()
    assert all(out[0, 0] % 1 == 0.25 for out, _ in seen)
    return [[int(out[0, 0]) // 256**n % 256 for n in range(count)] for out, count in seen]


@pytest.mark.parametrize("lent", [False, True], ids=["copied tables", "lent tables"])
@pytest.mark.parametrize("pinned_blocks", [1, 4, 100])
@given(program=programs(), seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_no_order_that_streams_allow_shows(pinned_blocks: int, lent: bool, program, seed) -> None:
    """Every compute sees what it would if all ran in the order of the calls, whatever is late."""
    runtime = StrictRuntime(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        if lent:
            lend_tables(patch, runtime)
        assert seen_by(runtime, program, pinned_blocks) == contents(program)


def unordered(stream: StrictStream, event) -> None:
    """In place of waiting for an event."""


@pytest.mark.parametrize("what", ["waits between streams", "a ring's buffers", "lent tables"])
def test_the_stand_in_notices_what_is_left_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an order that is needed, some order that is allowed then shows, or is a fault."""
    program = [step for n in range(1, 9) for step in (Copy(n, n % SLOTS), Compute((n % SLOTS,)))]
    monkeypatch.setattr(kernels, "run", run_stamps)
    if what == "waits between streams":
        monkeypatch.setattr(StrictStream, "wait_event", unordered)
    elif what == "a ring's buffers":
        monkeypatch.setattr("gpu_experts.cuda.feeder.HostBlocks._buffer", _first_buffer)
    wrong = 0
    for seed in [None, *range(12)]:
        runtime = StrictRuntime(seed)
        if what == "lent tables":
            lend_tables(monkeypatch, runtime)
            monkeypatch.setattr(CudaDevice, "_lent", _Forgetful(), raising=False)
        try:
            wrong += seen_by(runtime, program, 4) != contents(program)
        except Exception:
            wrong += 1
    assert wrong


def _first_buffer(self, event) -> torch.Tensor:
    return self._ring[0]


class _Forgetful:
    """In place of a list that keeps what kernels still read."""

    def __get__(self, device, kind=None) -> list:
        return []

    def __set__(self, device, value) -> None:
        """Keeps nothing."""


def test_slots_are_not_filled_while_their_memory_is_still_someone_elses() -> None:
    """Memory that torch hands on is the model's stream's: the first copy waits for that."""
    runtime = StrictRuntime()
    with runtime.here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", run_stamps)
        before = torch.zeros(SLOTS, small_layout().stride, dtype=torch.uint8, device=DEVICE)
        before += 1  # enqueued and not done
        del before
        target = CudaDevice(runtime=runtime)
        target.open(small_layout(), SLOTS)
        target.copy(stamp(7), 0, "copy").wait(20)
        out = target.new_output(1)
        event = target.compute(torch.zeros(1, 4, device=DEVICE), [0], [1.0], out, (), "compute")
        (seen,) = target.to_host(target.join(out, None, [event], torch.float32, 20))
        target.close()
    runtime.finish()
    assert seen[0, 0] == 7


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("slots", [0, 1, 5, LAYERS * EXPERTS])
def test_layers_shared_with_the_cpu(slots: int, seed: int | None) -> None:
    """Plans, copies, evictions, staging and joins over such streams: the CPU's own sums."""
    layers, rng = random_layers(), np.random.default_rng(slots)
    for layer in layers:
        layer.blocks.flags.writeable = False
    runtime = StrictRuntime(seed)
    with runtime.here():
        device = CudaDevice(runtime=runtime, pinned_bytes=8 * layers[0].blocks.shape[1])
        executor = shared_executor(layers, slots, device=device)
        for _ in range(4):
            tokens = int(rng.choice([1, 1, 3, 17]))
            for number, layer in enumerate(layers):
                hidden, ids, weights = random_step(rng, tokens)
                found = executor.run_layer(number, *map(_sent, (hidden, ids, weights)))
                (found,) = device.to_host(found)
                expected = on_cpu(layer, hidden, ids, weights)
                assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
        assert executor.device is device, executor.notes
        executor.residents.settle(20)
        executor.residents.check_integrity()
        poll(lambda: device._feeder.idle, 20, "the feeder")
        executor.close()
    runtime.finish()


def _sent(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE)


def placed_on(runtime: StrictRuntime, slots: int) -> tuple[Any, Executor]:
    """The demo model on such a device, with room for ``slots`` resident experts."""
    model, placement = placed(CudaDevice(runtime=runtime), slots)
    assert placement.executor is not None
    return model, placement.executor


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_model_whose_streams_are_late(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, routers, lookahead, prefetches, memory that runs out once: the CPU's logits.

    No operation mixes tensors of the device and of the host, which only a GPU would refuse.
    """
    runtime, inner, calls = StrictRuntime(seed, total_bytes=4 << 30), kernels.run, []

    def run(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        inner(*arguments)

    monkeypatch.setattr(kernels, "run", run)
    alone = demo()
    with runtime.here():
        model, executor = placed_on(runtime, 40)
        device = executor.device
        for ids in prompts(4):
            with torch.no_grad():
                found = model(ids.to(DEVICE)).logits.cpu()
            assert distance(found, logits(alone, ids)) < ROUNDING
        assert executor.device is device
        assert [note.what for note in executor.notes] == ["30 expert slots instead of 40"]
        executor.residents.settle(20)
        executor.residents.check_integrity()
        executor.close()
    runtime.finish()


@pytest.mark.parametrize(
    "kind",
    [
        "deepseek_v3",
        "gemma4_text",
        "gpt_oss",
        "jamba",
        "llama4_text",
        "longcat_flash",
        "qwen3_next",
    ],
)
def test_families_keep_to_the_device(kind: str, tmp_path: Path) -> None:
    """Shared experts, recurrent states, sinks, identity experts: nothing stays on the host.

    An operation on tensors of both is refused here as on a GPU.
    """
    config_kind, model_kind = causal_families()[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_kind(tiny_config(config_kind)).save_pretrained(tmp_path)
    model, _ = load_fast_model(tmp_path, fast=False, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model(ids).logits, model.generate(ids, **options)
    runtime = StrictRuntime()
    with runtime.here(), torch.no_grad():
        hardware = find_hardware("rtx4060-laptop-8gb")
        device = CudaDevice(runtime=runtime)
        place_model(Model(model), device, hardware, Budget(None, None, 64), threads=1)
        found = model(ids.to(DEVICE)).logits.cpu(), model.generate(ids.to(DEVICE), **options).cpu()
        device.close()
    runtime.finish()
    assert distance(found[0], expected[0]) < ROUNDING
    assert found[1].shape == expected[1].shape


def test_generating_holds_the_host_up_twice_a_token() -> None:
    """Transformers looks at each token and at whether all are done; no layer waits but to decide.

    Its waits are polls that other threads run beside; a small copy from ordinary memory, or a
    number asked for, would be counted here.
    """
    runtime = StrictRuntime(total_bytes=4 << 30)
    text, waits = HybridModel.from_pretrained(device="cpu", threads=1), []
    ids = text.encode(PROMPT)

    class Count:
        def put(self, value: torch.Tensor) -> None:
            waits.append(runtime.host_waits)

        def end(self) -> None:
            pass

    with runtime.here():
        model, executor = placed_on(runtime, 40)
        options = {"do_sample": False, "max_new_tokens": 6}
        found = model.generate(
            ids.to(DEVICE),
            attention_mask=torch.ones_like(ids).to(DEVICE),
            streamer=Count(),
            **options,
        ).cpu()
        executor.close()
    runtime.finish()
    assert text.tokenizer.decode(found[0, ids.shape[1] :]) == text.generate(PROMPT, **options)
    assert set(np.diff(waits[2:])) == {2}
