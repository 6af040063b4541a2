"""The machine that a model runs on, and how much of its memory may be used.

Loads neither torch nor numba, so that a dry run is about the machine that a run finds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpu_experts.backends import emulation
from hybrid.ask.asked_model import AskedModel
from hybrid.ask.names import find_hardware
from hybrid.ask.options import Options
from hybrid.ask.sizes import at_most
from hybrid.errors import UsageError
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.coverage import Coverage
from planner.describe.estimate import Source
from planner.describe.hardware import CONTEXT_BYTES, PANELS, Gpu, HardwareSpec, Quantity
from planner.describe.words import in_words

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
        What it is and what it does how fast.
    origin
        Which one it is, for whoever named none.
    emulated
        Whether its GPU is emulated.
    """

    spec: HardwareSpec
    origin: str = ""
    emulated: bool = False

    @classmethod
    def find(cls, model: AskedModel, options: Options) -> Machine | None:
        """Return this machine as a model runs on it; None where it has to be measured first.

        It has the device that a run takes: the one that is asked for, the GPU that was measured,
        or an emulated one where VRAM is asked for and there is none; and no more memory in use
        than is asked for.

        Raises
        ------
        UsageError
            When a calibration is damaged, VRAM is asked for of a GPU that was not measured, or
            there is less memory than is asked for, or fewer threads.
        """
        vram_bytes, threads = options.vram_bytes, options.threads
        ram_bytes, limit = host.checked_ram(options.ram_bytes), host.limited_memory()
        if ram_bytes is None and limit is not None:
            ram_bytes = int(limit.value)
        if threads is not None:
            threads = host.check_threads(threads, host.most_threads())
        spec, gpu = calibrations.in_force(threads)
        if options.alone:
            spec, gpu = calibrations.alone(threads, calibrations.load), ""
        elif options.device == emulation().name or (vram_bytes and not gpu):
            if options.device is None:
                _refuse_unmeasured()
            return cls.emulating(model, threads).within(vram_bytes, ram_bytes)
        if spec is None:
            return None
        beside = f" with {gpu}" if gpu else ""
        machine = cls(spec, f"this machine, as it was calibrated{beside}")
        return machine.within(vram_bytes, ram_bytes)

    @classmethod
    def emulating(cls, model: AskedModel, threads: int | None = None) -> Machine:
        """Return this machine with an emulated GPU.

        It is what was measured, if that was with the shape of ``model``. Else the GPU is that of
        ``EMULATED_AS``, beside this machine's CPU where that was calibrated. The memory is this
        machine's in any case.
        """
        origin = "this machine with an emulated GPU, as 'hybrid run' takes where there is none"
        own = calibrations.usable(Identity.of_this_machine(threads, EMULATED))
        if own is not None and Coverage.of(own, model.spec, model.experts, model.dense).whole:
            return cls(own.emulated(), origin, emulated=True)
        cpu, like = calibrations.alone(threads), find_hardware(EMULATED_AS)
        if cpu is not None:
            return cls(emulated_hardware(cpu, like).emulated(), origin, emulated=True)
        installed = Identity.of_this_machine(threads).ram_bytes
        ram = Quantity(installed, Source.MEASURED, "this machine's own figure")
        spec = replace(like, cpu=replace(like.cpu, ram_bytes=ram))
        return cls(spec.emulated(), origin, emulated=True)

    def within(
        self,
        vram_bytes: int | None,
        ram_bytes: int | None,
        device: tuple[str, tuple[int, int]] | None = None,
    ) -> Machine:
        """Return it with the memory that may be used of it.

        Parameters
        ----------
        vram_bytes, ram_bytes
            What is asked for; None is all there is, and no VRAM is the CPU alone.
        device
            What the GPU is called and has in all and free, in bytes, where that is known; else it
            has what its description says, all of it free, and an emulated one what is asked for.

        Raises
        ------
        UsageError
            When more is asked for than the GPU has, or than others leave of it.
        """
        spec, gpu = self.spec, self.spec.gpu
        if vram_bytes == 0:
            spec = replace(spec, gpu=None, link=None)
        elif gpu is not None and device is not None:
            spec = spec.with_values("gpu", vram_bytes=usable_vram(gpu, vram_bytes, *device))
        elif vram_bytes is not None:
            if gpu is not None and not self.emulated:
                whole = int(gpu.vram_bytes.value)
                vram_bytes = usable_vram(gpu, vram_bytes, gpu.name, (whole, whole))
            spec = spec.with_values("gpu", vram_bytes=vram_bytes)
        if ram_bytes is not None:
            spec = spec.with_values("cpu", ram_bytes=ram_bytes)
        return replace(self, spec=spec, emulated=self.emulated and spec.gpu is not None)


def usable_vram(gpu: Gpu, asked: int | None, name: str, memory: tuple[int, int]) -> int:
    """Return how much of a GPU this program may use, its driver's context included.

    A context that is there already is missing in what the device tells to be free, and counts as
    ours: whoever asks for all of a card gets all of it.

    Parameters
    ----------
    gpu
        Says what the driver takes.
    asked
        Bytes; None is all that is free.
    name, memory
        What it is called, and its bytes in all and free.

    Raises
    ------
    UsageError
        When more is asked for than the device has, or than others leave.
    """
    total, free = memory
    reserve = int(gpu.reserve_bytes.value)
    usable = min(total, free + min(reserve, CONTEXT_BYTES))
    if asked is None:
        return usable
    if at_most(asked, total, "vram", name) > free + reserve:
        raise UsageError(
            f"vram is {in_words(asked)}, {name} has {in_words(free)} free",
            hint="close what else uses the device, or leave vram out to use what is free",
        )
    return min(asked, usable)


def _refuse_unmeasured() -> None:
    """Refuse to plan with a GPU that was not measured: a run would measure it first."""
    unmeasured = [gpu.name for gpu in host.gpus() if gpu.driver]
    if unmeasured:
        raise UsageError(
            f"{unmeasured[0]} of this machine was not measured yet",
            hint=f"{calibrations.REMEDY}, or name a machine with --hardware",
        )


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
