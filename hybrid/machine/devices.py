"""Which device a model runs on: a GPU that is there, an emulated one, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cpu_experts.ffn import run_experts
from cpu_experts.jit.workers import use_threads
from gpu_experts.cuda.runtime import ran_out_of_memory
from gpu_experts.device import F32, I32, U8, Device
from gpu_experts.emulated.device import EmulatedDevice
from hybrid.ask.names import find_hardware
from hybrid.ask.sizes import size_in_bytes
from hybrid.errors import UsageError, first_line
from hybrid.formats.block import Block
from hybrid.formats.notes import Note
from hybrid.machine.machines import EMULATED, EMULATED_AS

Size = str | int | None


def choose_device(device: str | int | torch.device | None, vram: Size) -> str | None:
    """Return ``cuda:N``, ``emulated``, or None for the CPU alone.

    Parameters
    ----------
    device
        ``"cuda"``, ``"cuda:1"``, ``"emulated"``, ``"cpu"``, what torch calls a device, a GPU's
        number, or None to choose: the GPU that is there; without one the CPU, or an emulated
        device where vram is asked for.
    vram
        0 is the CPU alone.

    Raises
    ------
    UsageError
        When the name is unknown or the device is not there.
    """
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
        raise UsageError(
            f"device is {device!r}, neither a name nor a number",
            hint="choose cuda, cuda:N, emulated or cpu, or leave it out",
        )
    name = f"cuda:{device}" if isinstance(device, int) else None if device is None else str(device)
    asked = size_in_bytes(vram, "vram")
    if name == "cpu" or asked == 0:
        if name == "cpu" and asked:
            raise UsageError(
                f"vram {vram!r} is asked for with device 'cpu'",
                hint="leave one of them out: the CPU has no vram",
            )
        if name not in (None, "cpu"):
            raise UsageError(
                f"device {name!r} is asked for with vram {vram!r}",
                hint="leave one of them out: vram=0 is the CPU alone",
            )
        return None
    if name is None:
        if torch.cuda.is_available():
            return "cuda:0"
        return "emulated" if asked else None
    if name == "emulated":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or index.isdecimal()):
        raise UsageError(
            f"unknown device {name!r}", hint="choose cuda, cuda:N, emulated or cpu, or leave it out"
        )
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is asked for, torch finds {torch.cuda.device_count()} CUDA devices",
            hint="leave the device out, or install a torch that is built for CUDA",
        )
    return f"cuda:{index or 0}"


def dtype_on(device: torch.device) -> torch.dtype | None:
    """What dense layers are computed in on a device unless asked; None as on the CPU."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def open_device(name: str, vram_bytes: int | None, shape: Block, threads: int) -> Device:
    """Return the device called ``name`` for experts of ``shape``.

    An emulated one has as much memory as is asked for, or as the GPU it is planned as.
    """
    if name != "emulated":
        from gpu_experts.cuda.device import CudaDevice

        return CudaDevice(int(name.partition(":")[2]))
    if vram_bytes is None:
        gpu = find_hardware(EMULATED_AS).gpu
        assert gpu is not None
        vram_bytes = int(gpu.vram_bytes.value)
    return emulated_device(vram_bytes, shape, threads)


@dataclass(frozen=True)
class ToEmulate:
    """A device that is emulated once it is known what experts it computes."""

    name = EMULATED

    def open(self, shape: Block, threads: int) -> Device:
        """Return it, with as much memory as the GPU that it is planned as."""
        return open_device("emulated", None, shape, threads)


def emulated_device(capacity_bytes: int, shape: Block, threads: int) -> EmulatedDevice:
    """Return a device that computes with the CPU's kernels, in ``capacity_bytes`` of its own."""

    def run(x: F32, slot_ids: I32, weights: F32, slots: U8, out: F32) -> None:
        use_threads(threads)
        run_experts(x, slot_ids, weights, slots, shape, out)

    return EmulatedDevice(capacity_bytes, run=run)


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
        if not ran_out_of_memory(error):
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
