"""What runs experts on a GPU is tried out before it is relied on."""

from __future__ import annotations

import logging
from subprocess import CalledProcessError

import pytest
import torch

from fake_cuda import FakeRuntime
from gpu_experts.cuda import kernels
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.cuda.runtime import runs_on
from gpu_experts.errors import DeviceFailedError, DeviceMemoryError
from naive_gpu import small_layout
from stamped_slots import call, cuda_device, stamp


def _refusing(error: BaseException | None, off: float = 0.0):
    """In place of kernels: Triton's raise ``error``, or are off."""
    plain = kernels.run

    def run(x, routing, table, slots, layout, out, implementation) -> None:
        if implementation == "triton" and error is not None:
            raise error
        plain(x, routing, table, slots, layout, out, "torch")
        if implementation == "triton":
            out += off * out.abs().max()

    return run


def _add_host(out, host, total) -> None:
    total.copy_(out + host)


@pytest.mark.parametrize(
    ("error", "off", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nmore"), 0, "cannot run here: Failed to find C"),
        (CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), 0, "here: /usr/bin/gcc failed to comp"),
        (None, 0.2, "triton's kernels are wrong here: 0.2 of the largest output off at 1 tokens"),
    ],
)
def test_a_triton_that_cannot_run_is_said_and_replaced(
    error, off: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a C compiler, or wrong: found out at open, and plain torch runs instead."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "has_triton", lambda: True)
        patch.setattr(kernels, "run", _refusing(error, off))
        patch.setattr(kernels, "add_host", _add_host)
        target = cuda_device()
    (note,) = target.notes
    assert reason in note.reason
    target.copy(stamp(7), 0, "copy")
    out, event = call(target, [0])
    target.join(out, None, [event], torch.float32, 20)
    target.close()


def test_kernels_are_tried_once_for_every_type_of_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU's own type when it is opened, another one when it first comes; then no more."""
    tried = []

    def probe(layout, dtype, device, send) -> None:
        tried.append(dtype)

    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "run", _refusing(None))
    monkeypatch.setattr(kernels, "probe", probe)
    runtime = FakeRuntime()
    runtime.dtype = torch.float16
    target = cuda_device(runtime)
    assert tried == [torch.float16]
    assert [note.what for note in target.notes] == [kernels.NO_TENSOR_CORES.what]
    target.copy(stamp(7), 0, "copy")
    for _ in range(2):
        call(target, [0])
    target.open(small_layout(), 2)
    assert tried == [torch.float16, torch.float32]
    target.close()


def test_memory_that_runs_out_outside_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, cuBLAS's and the driver's ways to say so are the same error as torch's own."""
    target = cuda_device()
    target.copy(stamp(1), 0, "copy").wait(20)
    for said in (
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
    ):

        def run(*arguments, said=said) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr(kernels, "run", run)
        with pytest.raises(DeviceMemoryError, match="no memory on fake"):
            call(target, [0], "kernel")
    target.close()


def test_compiling_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The seconds that it takes are explained when they begin."""
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "run", _refusing(None))
    monkeypatch.setattr(kernels, "add_host", _add_host)
    with caplog.at_level(logging.INFO, "gpu_experts"):
        target = cuda_device()
        target.open(small_layout(), 1)
    assert [line.getMessage()[:21] for line in caplog.records] == ["compiling GPU kernels"]
    assert not target.notes
    target.close()


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 6), ["sm_75", "sm_89", "sm_90"], False),
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((12, 1), ["sm_120f"], True),
        ((12, 1), ["sm_120a"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["gfx1100"], True),
        ((9, 0), [], True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for(capability, built_for, runs: bool) -> None:
    """Machine code serves its own generation, intermediate code all later ones."""
    assert runs_on(capability, built_for) is runs


def test_a_gpu_that_torch_has_no_code_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before its first kernel fails somewhere in a model."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "GTX 1060",
        "get_device_capability": (6, 1),
        "get_arch_list": ["sm_75", "sm_86"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(DeviceFailedError, match=r"GTX 1060 \(cuda:0\) of compute .* 6\.1: it is"):
        CudaDevice()
