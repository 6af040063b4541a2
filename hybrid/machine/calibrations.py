"""The calibration in force: whose machine it is, where it lies, reading and adding to it.

Loads neither torch nor numba, so that ``hybrid plan`` and ``hybrid env`` can ask.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from cpu_experts.jit import hostcpu
from gpu_experts.backends import is_emulated, name_of
from hybrid.errors import UsageError
from hybrid.formats.notes import Note
from hybrid.formats.registry import weight_bytes
from hybrid.machine import host
from hybrid.machine.code_hash import code_hash
from hybrid.paths import cache_dir, make_cache_folder, write_whole
from planner.describe.bandwidth import raised
from planner.describe.checked_table import read_table
from planner.describe.estimate import Source
from planner.describe.hardware import PANELS, HardwareSpec, Point, Quantity, TermPoint, to_toml
from planner.describe.terms import MIXER
from planner.errors import SpecError

COMMAND = "hybrid calibrate"
REMEDY = f"measure this machine with '{COMMAND}'"
_RAM_STEP = 1 << 28
"""The same machine's RAM differs by a few pages from start to start."""
_TIMED = ("cpu_experts", "hybrid/formats", "hybrid/packed", "hybrid/fast", "hybrid/measure")
"""Sources that what is measured depends on: the kernels, the one-token path, experts and panels,
dense layers, and how all that is measured."""
_SHARED = ("gpu_experts", "hybrid/ledger", "hybrid/sharing", "planner")
"""And those that only count where experts are shared with a device, deciding included."""
_LIBRARIES = ("torch", "numba", "llvmlite", "numpy", "transformers")
_DEVICE = re.compile(r"^# device: (.+)$", re.MULTILINE)
_SOFTWARE = ("kernels", "versions")
"""Parts of an identity that an update changes."""


@dataclass(frozen=True)
class Identity:
    """What a calibration is valid for: one of another machine, or of older kernels, is not found.

    Parameters
    ----------
    cpu, cores, threads, simd_level
        The processor, how many of its cores this process may use, how many threads compute, and
        with which vector instructions and units for bfloat16 (:class:`hostcpu.Processor`).
    ram_bytes
        Installed memory, rounded.
    device
        The accelerator's name; empty without one.
    kernels
        A hash of the code that computes and that measures, whatever its comments say.
    versions
        Of the libraries that compute: a newer one has other kernels and other overheads.
    """

    cpu: str
    cores: int
    threads: int
    simd_level: str
    ram_bytes: int
    device: str
    kernels: str
    versions: str

    @classmethod
    def of_this_machine(cls, threads: int | None = None, device: str = "") -> Identity:
        """Ask the operating system; ``threads`` as the runtime chooses them unless given."""
        return cls(
            cpu=host.cpu_name(),
            cores=host.usable_cores(),
            threads=host.default_threads() if threads is None else threads,
            simd_level=str(hostcpu.processor()),
            ram_bytes=round(psutil.virtual_memory().total / _RAM_STEP) * _RAM_STEP,
            device=device,
            kernels=_kernels(bool(device)),
            versions=_versions(),
        )

    @property
    def path(self) -> Path:
        """Where this machine's calibration lies, whether or not there is one."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_dir() / "hardware" / f"{digest}.toml"

    def comment(self) -> str:
        """The identity as TOML comments, for whoever opens the file."""
        return "".join(f"# {name}: {value}\n" for name, value in asdict(self).items() if value)


@cache
def _kernels(on_device: bool) -> str:
    root = Path(__file__).parents[2]
    return code_hash(root, (*_TIMED, *(_SHARED if on_device else ())))


@cache
def _versions() -> str:
    """The libraries' versions as they are installed; importing them would take seconds."""
    found = []
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def load(identity: Identity | None = None) -> HardwareSpec | None:
    """Return the calibration of this machine; None when it was never measured.

    Raises
    ------
    UsageError
        When the file is damaged; the hint says how to make it anew.
    """
    here = identity or Identity.of_this_machine()
    if not here.path.exists():
        return None
    try:
        return HardwareSpec.from_table(read_table(here.path), str(here.path))
    except SpecError as error:
        raise UsageError(
            f"the calibration of this machine cannot be used: {error.message}",
            hint=f"measure it again with {_again(here)}",
        ) from error


def _again(identity: Identity) -> str:
    """The command that measures over a calibration."""
    words = [f"{COMMAND} --force"]
    if is_emulated(identity.device):
        words.append(f"--device {name_of(identity.device)}")
    if identity.threads != host.default_threads():
        words.append(f"--threads {identity.threads}")
    return f"'{' '.join(words)}'"


def usable(identity: Identity) -> HardwareSpec | None:
    """Return the calibration of this machine, for what goes on without one.

    None also where it is damaged, which :func:`damage` tells.
    """
    try:
        return load(identity)
    except UsageError:
        return None


def damage(identity: Identity) -> Note | None:
    """Say that a calibration is damaged, and what helps; None when it is not."""
    try:
        load(identity)
    except UsageError as error:
        return Note("a damaged calibration", error.message, str(error.hint))
    return None


def with_devices(threads: int | None = None) -> list[Identity]:
    """Return as whom this machine was measured together with a device, the first GPU first."""
    found = []
    for path in sorted(Identity.of_this_machine(threads).path.parent.glob("*.toml")):
        with suppress(OSError, UnicodeDecodeError):
            named = _DEVICE.search(path.read_text(encoding="utf-8"))
            if named and (here := Identity.of_this_machine(threads, named[1])).path == path:
                found.append(here)
    return sorted(found, key=lambda identity: identity.device.rpartition("(")[::-1])


def in_force(threads: int | None = None) -> tuple[HardwareSpec | None, str]:
    """Return this machine as a model runs on it unless told otherwise, and its GPU's name.

    That is with its first GPU where one was measured, else the CPU :func:`alone`. An emulated one
    is only used where it is asked for.

    Raises
    ------
    UsageError
        When the file is damaged.
    """
    for identity in with_devices(threads):
        if not is_emulated(identity.device):
            return load(identity), identity.device
    return alone(threads, load), ""


def alone(
    threads: int | None = None, read: Callable[[Identity], HardwareSpec | None] = usable
) -> HardwareSpec | None:
    """Return what was measured of this machine's CPU where it computes everything.

    That is its calibration without a device; what that does not know of, those with a device do:
    they measure the CPU, too, by the same code and before the device gets anything.

    Parameters
    ----------
    threads
        That compute.
    read
        Reads the former: :func:`load` to raise where it is damaged.

    Raises
    ------
    UsageError
        As ``read`` does.
    """
    found = read(Identity.of_this_machine(threads))
    for identity in with_devices(threads):
        beside = usable(identity)
        if beside is not None:
            cpu = without_device(beside)
            found = cpu if found is None else added(cpu, found)
    return found


def without_device(spec: HardwareSpec) -> HardwareSpec:
    """Return what a calibration with a device says of the CPU where that computes everything."""
    if spec.gpu is None:
        return spec
    terms = tuple(term for term in spec.terms if term.lane == "cpu")
    cpu = spec.cpu
    if any((term.term, term.tokens) == (MIXER, 1) for term in terms):
        # What it says of a layer is what one takes on the device.
        overhead = layer_overhead(terms, cpu.memory_bytes_per_s, single=True)
        cpu = replace(cpu, layer_overhead_s=overhead)
    return replace(
        spec,
        summary=f"{spec.summary}; without {spec.gpu.name}",
        cpu=cpu,
        gpu=None,
        link=None,
        points=tuple(point for point in spec.points if point.lane in ("cpu", PANELS)),
        terms=terms,
    )


def layer_overhead(terms: Iterable[TermPoint], rate: Quantity, *, single: bool) -> Quantity:
    """What attention takes on the CPU beyond reading its weights, in the smallest step.

    Parameters
    ----------
    terms
        Of the CPU, among them attention.
    rate
        At which weights are read.
    single
        Whether it is a single token's step.
    """
    steps = [t for t in terms if t.term == MIXER and (t.tokens == 1) == single]
    first = min(steps, key=lambda term: (term.tokens, term.context))
    rest_s = first.seconds - weight_bytes(first.params, first.format) / rate.value
    step = "a single token's" if single else f"{first.tokens} tokens'"
    origin = f"{COMMAND}: {step} attention and router without reading its weights"
    return Quantity(max(0.0, rest_s), Source.FITTED, origin)


def missing(identity: Identity | None = None) -> str:
    """Say why there is no calibration: damaged, never made, or of software replaced since."""
    here = identity or Identity.of_this_machine()
    if here.path.exists():
        return "the calibration of this machine is damaged"
    this_machine = _machine(here.comment())
    for path in sorted(here.path.parent.glob("*.toml")):
        with suppress(OSError, UnicodeDecodeError):
            if _machine(path.read_text(encoding="utf-8")) == this_machine:
                return "this machine was calibrated before hybrid or its libraries were updated"
    return "this machine was not calibrated yet"


def _machine(text: str) -> list[str]:
    """The comments that tell a machine, without those that tell its software."""
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    return [line for line in comments if line[2:].partition(":")[0] not in _SOFTWARE]


def require(identity: Identity | None = None) -> HardwareSpec:
    """Return the calibration of this machine.

    Raises
    ------
    UsageError
        When there is none, or it is damaged.
    """
    found = load(identity)
    if found is None:
        raise unmeasured(identity)
    return found


def unmeasured(identity: Identity | None = None) -> UsageError:
    """Return the error that says that this machine was not measured, and how to."""
    return UsageError(missing(identity), hint=REMEDY)


def save(spec: HardwareSpec, identity: Identity) -> Path:
    """Keep ``spec`` as this machine's calibration, and return where."""
    path = identity.path
    make_cache_folder(path.parent.name)
    write_whole(path, identity.comment() + to_toml(spec))
    return path


def added(old: HardwareSpec | None, new: HardwareSpec) -> HardwareSpec:
    """Return ``new`` with what ``old`` knows of other models' shapes.

    Where that was read faster than memory seems to be now, it is the bandwidth.
    """
    if old is None:
        return new
    points = {_point_key(point) for point in new.points}
    terms = {_term_key(term) for term in new.terms}
    return raised(
        replace(
            new,
            points=new.points + tuple(p for p in old.points if _point_key(p) not in points),
            terms=new.terms + tuple(t for t in old.terms if _term_key(t) not in terms),
        )
    )


def _point_key(point: Point) -> tuple[object, ...]:
    # Which of the CPU's ways is the faster one is told by those that were measured together.
    lane = "cpu" if point.lane == PANELS else point.lane
    return lane, point.hidden, point.intermediate, point.format


def _term_key(term: TermPoint) -> tuple[object, ...]:
    return term.term, term.family, term.kind, term.params, term.format, term.lane


def disturbed(measured: Iterable[Point | TermPoint]) -> float:
    """Part of the processors' time that other programs took while the worst of it was measured.

    0 where that was too little to matter.
    """
    return max((entry.disturbed or 0.0 for entry in measured), default=0.0)


def main_numbers(spec: HardwareSpec) -> Iterable[tuple[str, str]]:
    """Yield the numbers a person looks for first, as name and text."""

    def spread(error: float | None) -> str:
        return "" if error is None or not math.isfinite(error) else f" ± {error:.0%}"

    cpu = spec.cpu
    rate = cpu.memory_bytes_per_s
    yield "read bandwidth", f"{rate.value / 1e9:.1f} GB/s{spread(rate.error)}"
    share, flop = cpu.memory_efficiency, cpu.flop_per_s
    yield (
        "experts",
        f"{share.value:.0%}{spread(share.error)} of it for one token, "
        f"{flop.value / 1e9:.0f} GFLOP/s{spread(flop.error)} for many",
    )
    yield "disk", f"{spec.disk.bytes_per_s.value / 1e9:.2f} GB/s, {spec.disk.bytes_per_s.origin}"
    if spec.gpu and spec.link:
        yield "device", f"{spec.gpu.name}, link {spec.link.bytes_per_s.value / 1e9:.1f} GB/s"
    shapes = {f"{p.hidden} x {p.intermediate} {p.format}" for p in spec.points if p.lane == "cpu"}
    yield "expert shapes", ", ".join(sorted(shapes))
    for lane, name in (("cpu", "models"), ("gpu", "on the device")):
        attention = [t for t in spec.terms if (t.term, t.lane) == (MIXER, lane)]
        families = {f"{t.family} with {t.format}" for t in attention}
        if families or lane == "cpu" or spec.gpu:
            yield name, ", ".join(sorted(families)) or "none"
    if taken := disturbed([*spec.points, *spec.terms]):
        yield (
            "disturbed",
            f"other programs used {taken:.0%} of the processors; {REMEDY} when they are closed",
        )
