"""Which machine a model runs on where nobody describes one: this one, perhaps with an emulated GPU.

Loads neither torch nor numba, so that a dry run is about the machine that a run finds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpu_experts.backends import emulation
from hybrid.ask.asked_model import Subject
from hybrid.ask.names import find_hardware
from hybrid.errors import UsageError
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.coverage import Coverage
from planner.describe.estimate import Source
from planner.describe.hardware import PANELS, HardwareSpec, Quantity

EMULATED_AS = "rtx4060-laptop-8gb"
"""The machine whose device and link an emulated device is taken for when experts are placed."""
EMULATED = emulation().calibrated_as
"""What the device is called that computes in a GPU's place."""


@dataclass(frozen=True)
class Machine:
    """A machine that a model runs on.

    Attributes
    ----------
    spec
        What it is.
    told
        Which one it is, for whoever named none.
    emulated
        Whether its GPU is emulated.
    """

    spec: HardwareSpec
    told: str = ""
    emulated: bool = False

    def with_memory(self, vram_bytes: int | None, ram_bytes: int | None) -> Machine:
        """Return it with so much memory in use; None is all of it, and no VRAM is the CPU alone."""
        spec = self.spec
        if vram_bytes == 0:
            spec = replace(spec, gpu=None, link=None)
        elif vram_bytes is not None:
            spec = spec.with_values("gpu", vram_bytes=vram_bytes)
        if ram_bytes is not None:
            spec = spec.with_values("cpu", ram_bytes=ram_bytes)
        return replace(self, spec=spec, emulated=self.emulated and spec.gpu is not None)


def this_machine(
    wanted: Subject, vram_bytes: int | None, threads: int | None = None
) -> Machine | None:
    """Return this machine as ``wanted`` runs on it; None where it would have to be measured first.

    Parameters
    ----------
    vram_bytes
        What is asked for: 0 is the CPU alone, None whatever there is. A machine without a GPU
        emulates one where some is asked for.
    threads
        Of the CPU, as the runtime chooses them unless given.

    Raises
    ------
    UsageError
        When a calibration is damaged, or VRAM is asked for of a GPU that was not measured.
    """
    spec, gpu = calibrations.in_force(threads)
    if vram_bytes == 0:
        spec, gpu = calibrations.alone(threads, calibrations.load), ""
    elif vram_bytes and not gpu:
        if unmeasured := [found.name for found in host.gpus() if found.driver]:
            raise UsageError(
                f"{unmeasured[0]} of this machine was not measured yet",
                hint=f"{calibrations.REMEDY}, or name a machine with --hardware",
            )
        told = "this machine with an emulated GPU, as 'hybrid run' takes where there is none"
        return Machine(with_emulated(wanted, threads), told, emulated=True)
    if spec is None:
        return None
    beside = f" with {gpu}" if gpu else ""
    return Machine(spec, f"this machine, as it was calibrated{beside}")


def with_emulated(
    wanted: Subject, threads: int | None = None, name: str = EMULATED
) -> HardwareSpec:
    """Return this machine with an emulated GPU.

    It is what was measured, if that was with the shape of ``wanted``. Else the GPU is that of
    ``EMULATED_AS``, beside this machine's CPU where that was calibrated. The memory is this
    machine's in any case.
    """
    own = calibrations.usable(Identity.of_this_machine(threads, name))
    if own is not None and Coverage.of(own, wanted.model, wanted.experts, wanted.dense).whole:
        return own.emulated()
    cpu, like = calibrations.alone(threads), find_hardware(EMULATED_AS)
    if cpu is not None:
        return emulated_hardware(cpu, like).emulated()
    installed = Identity.of_this_machine(threads).ram_bytes
    ram = Quantity(installed, Source.MEASURED, "this machine's own figure")
    return replace(like, cpu=replace(like.cpu, ram_bytes=ram)).emulated()


def emulated_hardware(cpu: HardwareSpec, like: HardwareSpec) -> HardwareSpec:
    """Return the CPU of one machine with the GPU and the link of another.

    What the modelling code and deciding cost a layer is the other's, too: beside a GPU.

    Raises
    ------
    UsageError
        When the other has no GPU.
    """
    if like.gpu is None:
        raise UsageError(f"{like.name} has no GPU to emulate", hint="choose hardware with one")
    return replace(
        cpu,
        name=f"{cpu.name} with the GPU of {like.name}",
        cpu=replace(
            cpu.cpu, layer_overhead_s=like.cpu.layer_overhead_s, deciding_s=like.cpu.deciding_s
        ),
        gpu=like.gpu,
        link=like.link,
        points=tuple(point for point in cpu.points if point.lane in ("cpu", PANELS)),
        terms=tuple(term for term in cpu.terms if term.lane == "cpu"),
    )
