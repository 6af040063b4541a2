"""Whole models on a GPU, and on what stands for one: the CPU's logits, faults, calibration.

The stand-in computes with the same kernels in plain torch, at once and on the CPU: it proves the
tests and the bookkeeping, not streams, Triton or speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from demo_on_cuda import ROUNDING, demo, distance, logits, placed, prompts
from fake_cuda import FakeRuntime
from gpu_experts.backends import BACKENDS
from gpu_experts.cuda import CUDA, kernels
from gpu_experts.cuda import device as cuda
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.errors import DeviceFailedError, DeviceMemoryError
from hybrid.cli import main
from hybrid.formats.notes import Note
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.session.model import HybridModel
from planner.describe.hardware import PANELS
from shared_demo import GREEDY, PROMPT

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)

Open = Callable[[], CudaDevice]


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Makes a device, closed."""
    if request.param == "cuda":
        return CudaDevice
    runtime = FakeRuntime(total_bytes=4 << 30)
    monkeypatch.setattr(cuda, "CudaRuntime", lambda index: runtime)
    monkeypatch.setitem(BACKENDS, "cuda", replace(CUDA, count=lambda: 1))
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    return CudaDevice


@pytest.mark.parametrize("slots", [0, 1, 17, 96])
def test_logits_are_the_cpus_whatever_is_resident(device: Open, slots: int) -> None:
    """As residency changes from call to call, logits stay those of the CPU but for rounding."""
    alone = demo()
    target = device()
    model, placement = placed(target, slots)
    for ids in prompts(8):
        expected = logits(alone, ids)
        assert distance(logits(model, ids), expected) < ROUNDING
    executor = placement.executor
    assert executor is not None
    assert executor.device is target, executor.notes
    executor.residents.settle(20)
    executor.residents.check_integrity()
    executor.close()


def test_greedy_text_is_the_cpus(device: Open) -> None:
    """The trained model's text does not depend on where its experts run."""
    text = HybridModel.from_pretrained(device="cpu", threads=1)
    ids = text.encode(PROMPT)
    model, placement = placed(device(), 40)
    found = model.generate(ids.to(model.device), attention_mask=torch.ones_like(ids), **GREEDY)
    assert text.tokenizer.decode(found[0, ids.shape[1] :]) == text.generate(PROMPT, **GREEDY)
    assert placement.executor is not None
    placement.executor.close()


def test_memory_that_runs_out_shrinks_the_slots(
    device: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without memory: fewer slots from then on, the same logits, and a line about it."""
    model, placement = placed(device(), 96)
    executor = placement.executor
    assert executor is not None
    executor.guard.warm()
    inner, refused = kernels.run, []

    def run(*arguments: Any) -> None:
        if not refused:
            refused.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        inner(*arguments)

    monkeypatch.setattr(kernels, "run", run)
    ids = prompts(2)[1]
    assert distance(logits(model, ids), logits(demo(), ids)) < ROUNDING
    assert refused
    assert executor.slot_count == 72
    assert executor.device is not None
    assert [note.what for note in executor.notes] == ["72 expert slots instead of 96"]
    assert distance(logits(model, ids), logits(demo(), ids)) < ROUNDING
    executor.close()


def breaking(model: Any, error: Callable[[], BaseException], times: int) -> list[int]:
    """Let the model's output head fail so often; the list grows with every time it does."""
    struck: list[int] = []

    def strike(*_: Any) -> None:
        if len(struck) < times:
            struck.append(1)
            raise error()

    model.get_output_embeddings().register_forward_pre_hook(strike)
    return struck


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_dense_layer_without_memory_takes_slots_until_it_has_enough(
    device: Open, error: RuntimeError
) -> None:
    """Twice is not the end: slots are given up step by step, and the logits stay the CPU's."""
    model, placement = placed(device(), 96)
    executor = placement.executor
    assert executor is not None
    struck = breaking(model, lambda: type(error)(*error.args), 2)
    ids = prompts(2)[1]
    assert distance(logits(model, ids), logits(demo(), ids)) < ROUNDING
    assert len(struck) == 2
    assert executor.slot_count == 54
    executor.close()


def test_memory_that_no_slot_can_make_up_for_is_one_clear_error(device: Open) -> None:
    """When all slots are gone, the error says so and what to do, and is no framework's."""
    model, placement = placed(device(), 3)
    breaking(model, lambda: torch.OutOfMemoryError("CUDA out of memory."), 100)
    with pytest.raises(DeviceMemoryError, match="although no expert is there") as caught:
        logits(model, prompts(1)[0])
    assert "shorter prompt" in caught.value.hint
    assert placement.executor is not None
    placement.executor.close()


def test_a_gpu_that_fails_under_dense_layers_is_one_clear_error(device: Open) -> None:
    """They run nowhere else; an error that is the model's own stays what it is."""
    model, placement = placed(device(), 3)
    said = "CUDA error: an illegal memory access was encountered"
    breaking(model, lambda: torch.AcceleratorError(said), 1)
    with pytest.raises(DeviceFailedError, match="failed: CUDA error: an illegal") as caught:
        logits(model, prompts(1)[0])
    assert "start again" in caught.value.hint
    breaking(model, lambda: RuntimeError("The size of tensor a must match"), 1)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        logits(model, prompts(1)[0])
    assert placement.executor is not None
    placement.executor.close()


def test_what_the_device_says_is_in_the_report(
    device: Open,
    quick: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is found out when slots are opened is said at once, and all of it in every report."""
    for calibrated_by_now in (False, True):
        model = HybridModel.from_pretrained(device="cuda", threads=1, context=256)
        said, executor = capsys.readouterr().err, model.placement.executor
        assert ("measuring" in said) != calibrated_by_now
        if not torch.cuda.is_available():
            assert "experts on the GPU in plain torch: triton is not installed" in said
        executor.device.notes.append(Note("copies from ordinary memory", "refused", "ulimit"))
        paths = {path.what for path in model.report().slow_paths}
        assert {note.what for note in executor.device.notes} <= paths
        model.close()


def test_calibrating_a_gpu_from_the_command_line(
    device: Open,
    quick: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    either_processor: bool,
) -> None:
    """Its copies and kernels become part of this machine's description, under its name."""
    assert main(["calibrate", str(tiny_model), "--device", "cuda", "--threads", "1"]) == 0
    name = device().name
    spec = calibrations.load(Identity.of_this_machine(1, name))
    assert spec is not None
    assert spec.gpu is not None
    assert spec.link is not None
    assert spec.gpu.name == name
    panels = {PANELS} if either_processor else set()
    assert {point.lane for point in spec.points} == {"cpu", "gpu", "copy"} | panels
    assert all(point.seconds > 0 for point in spec.points)
    assert {term.lane for term in spec.terms} == {"cpu", "gpu"}, spec.summary
    assert f"{name}, link " in capsys.readouterr().out
    assert calibrations.load(Identity.of_this_machine(1)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_is_loaded_onto_the_gpu_and_reports(quick: Path) -> None:
    """As users do it: calibrated on first use, in the GPU's own type, with both sides of terms."""
    model = HybridModel.from_pretrained(device="cuda", threads=1, context=256)
    assert model.generate(PROMPT, **GREEDY)
    report = model.report()
    assert torch.cuda.get_device_name(0) in str(report.placement)
    measured = {term.name for term in report.terms if term.measured_s is not None}
    assert {"a step", "attention and router", "experts", "gpu"} <= measured
    assert report.figures["hit_rate"].value is not None
