"""Which device a model runs on: a GPU that is there, an emulated one, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpu_experts.ffn import run_experts
from cpu_experts.jit.workers import use_threads
from gpu_experts import backends
from gpu_experts.backend import StandIn
from gpu_experts.device import F32, I32, U8, Device, Run
from hybrid.ask.names import find_hardware
from hybrid.errors import UsageError, first_line
from hybrid.formats.block import Block
from hybrid.formats.notes import Note
from hybrid.machine.machines import EMULATED_AS


def choose_device(name: str | None, vram_bytes: int | None) -> str | None:
    """Return what users call the chosen device, such as ``cuda:0``, or None for the CPU alone.

    Parameters
    ----------
    name
        A name such as ``"cuda"``, ``"cuda:1"``, ``"emulated"`` or ``"cpu"``, or None to choose:
        the GPU that is there; without one the CPU, or an emulated device where vram is asked for.
    vram_bytes
        0 is the CPU alone.

    Raises
    ------
    UsageError
        When the name is unknown or the device is not there.
    """
    if name == "cpu" or vram_bytes == 0:
        return None
    if name is None:
        backend = backends.first_there() or (backends.emulation() if vram_bytes else None)
        return None if backend is None else backend.called(0)
    found = backends.find(name)
    if found is None:
        raise UsageError(
            f"unknown device {name!r}", hint=f"choose {backends.choices()} or cpu, or leave it out"
        )
    backend, number = found
    count = backend.count()
    if number >= count:
        raise UsageError(
            f"device {name} is asked for, {backend.absent.format(count=count)}",
            hint=f"leave the device out, or {backend.remedy}",
        )
    return backend.called(number)


def open_device(name: str, vram_bytes: int | None, threads: int) -> Device:
    """Return the device that users call ``name``, which is there.

    Parameters
    ----------
    vram_bytes
        Memory of an emulated one; None is that of the GPU that it is planned as.
    threads
        That compute where it is emulated.
    """
    found = backends.find(name)
    assert found is not None, name
    backend, number = found
    if vram_bytes is None:
        gpu = find_hardware(EMULATED_AS).gpu
        assert gpu is not None
        vram_bytes = int(gpu.vram_bytes.value)
    return backend.open(number, StandIn(vram_bytes, _on_cpu(threads)))


def _on_cpu(threads: int) -> Run:
    """Return what computes a device's experts with the CPU's kernels."""

    def run(x: F32, slot_ids: I32, weights: F32, slots: U8, layout: Block, out: F32) -> None:
        use_threads(threads)
        run_experts(x, slot_ids, weights, slots, layout, out)

    return run


@contextmanager
def memory_told(
    device: Device,
    what: str = "has no room for the dense weights",
    remedy: str = "close what else uses it, or use vram=0 for the CPU alone",
) -> Iterator[None]:
    """Say what happened and what helps when a device's memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not device.backend.ran_out_of_memory(error):
            raise
        raise UsageError(f"{device.name} {what}: {first_line(error)}", hint=remedy) from error


def emulation_note(*, by_name: bool) -> Note:
    """Say that there is no GPU and what that means."""
    reason = "it was asked for by name" if by_name else "vram was asked for and there is none"
    return Note(
        "an emulated device instead of a GPU",
        f"{reason}; it computes on the CPU, exactly but slower than the CPU alone",
        "leave out vram and device, or run on a machine with a CUDA GPU",
    )
