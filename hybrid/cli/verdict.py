"""What ``hybrid env`` makes of this machine: what is as fast as it can be here, and what is not.

Loads neither torch nor numba: what only a model can tell is said to be open.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from cpu_experts.errors import BackendError
from cpu_experts.jit import hostcpu
from hybrid.machine import calibrations, host, versions
from hybrid.machine.calibrations import Identity

_UNSET = f"unset {hostcpu.ENVIRONMENT_VARIABLE}"


@dataclass(frozen=True)
class Finding:
    """One part of the verdict.

    Attributes
    ----------
    what
        What it is about.
    told
        How that is here, and why.
    slower
        Whether something is slower than it could be, or may be for all that is known.
    remedy
        What helps; empty where nothing is to be done.
    """

    what: str
    told: str
    slower: bool = False
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.told}; {self.remedy}" if self.remedy else self.told


def wrong_switch() -> tuple[Finding, ...]:
    """Take a ``HYBRID_SIMD`` that cannot be out of this process's environment; return it if so.

    Everything else is then told as it is without it.
    """
    try:
        hostcpu.processor()
    except BackendError as error:
        del os.environ[hostcpu.ENVIRONMENT_VARIABLE]
        told = f"{error.message}, so nothing runs"
        return (Finding(hostcpu.ENVIRONMENT_VARIABLE, told, True, error.hint or _UNSET),)
    return ()


def verdict() -> tuple[Finding, ...]:
    """Return everything that decides how fast models run here."""
    return (
        _fast_path(),
        _simd_level(),
        _bf16_units(),
        _threads(),
        _calibration(),
        _versions(),
    )


def in_one_line(findings: tuple[Finding, ...]) -> str:
    """Return what all findings come to."""
    slow = [finding.what for finding in findings if finding.slower]
    if not slow:
        return "nothing is slower than it could be on this machine"
    return f"slower than it could be, or not known to be as fast: {', '.join(slow)}"


def _fast_path() -> Finding:
    """Tell whether single tokens take the one-token kernels, as far as versions decide it."""
    if missing := _missing():
        return Finding("fast path", f"no: {missing} cannot be loaded", True)
    if unknown := versions.untested():
        names = ", ".join(f"{each.package} {each.version}" for each in unknown)
        return Finding("fast path", f"not known before a model is loaded, with {names}", True)
    where = ""
    if any(gpu.driver for gpu in host.gpus()):
        where = " on the CPU alone"  # beside a device, transformers' code runs around the experts
    told = f"yes{where}, for models whose layers pass its test when they are loaded"
    return Finding("fast path", told)


def _simd_level() -> Finding:
    processor, actual = hostcpu.processor(), hostcpu.actual()
    if processor.emulated:
        told = f"{processor.kernels}, emulated with AVX2 instructions for a check"
        return Finding("SIMD level", told, True, _UNSET)
    if processor.level != actual.level:
        asked = f"{hostcpu.ENVIRONMENT_VARIABLE} asks for it"
        told = f"{processor.level}: {asked}, this processor runs {actual.level}"
        return Finding("SIMD level", told, True, _UNSET)
    if processor.level == "portable":
        told = "portable: there are no vector kernels for this processor"
        return Finding("SIMD level", told, True, "use an x86 processor with AVX2 or newer")
    return Finding("SIMD level", f"{processor.level}, the best that this processor runs")


def _bf16_units() -> Finding:
    counted, there = hostcpu.processor().units, hostcpu.actual().units
    what, variable = "bfloat16 units", hostcpu.ENVIRONMENT_VARIABLE
    if counted and not there:
        told = f"{variable} counts on {_listed(counted)}, this processor has none"
        return Finding(what, told, True, _UNSET)
    if counted:
        return Finding(
            what, f"used: {_listed(counted)}; large models compute dense layers in bfloat16"
        )
    if there:
        told = f"not used: {variable} hides those of this processor ({_listed(there)})"
        return Finding(what, told, True, _UNSET)
    return Finding(what, "this processor has none; dense layers are computed in float32")


def _listed(units: frozenset[str]) -> str:
    return ", ".join(sorted(units))


def _threads() -> Finding:
    threads, cores = host.default_threads(), host.usable_cores()
    if threads >= cores:
        return Finding("threads", f"{threads}, for {cores} cores")
    told = f"{threads}, for {cores} cores: the environment asks for no more"
    return Finding("threads", told, True, "unset OMP_NUM_THREADS and NUMBA_NUM_THREADS")


def _calibration() -> Finding:
    """Tell whether this machine was measured: needed to predict, and to use bfloat16 units best."""
    identity = Identity.of_this_machine()
    damaged = calibrations.damage(identity)
    if damaged is not None:
        return Finding("calibration", damaged.reason, True, damaged.remedy)
    if calibrations.alone() is not None:
        return Finding("calibration", "there is one, for predictions and for experts in prompts")
    told = f"none, {calibrations.missing(identity)}: nothing is predicted"
    units = bool(hostcpu.processor().units)
    if units:
        told += ", and prompts use the bfloat16 units by a first rough measurement"
    return Finding("calibration", told, units, calibrations.REMEDY)


def _versions() -> Finding:
    if missing := _missing():
        return Finding("versions", f"not installed: {missing}", True, f"pip install {missing}")
    if unknown := versions.untested():
        told, remedies = "; ".join(map(str, unknown)), [each.remedy for each in unknown]
        return Finding("versions", told, True, " and ".join(remedies))
    found = [f"{name} {metadata.version(name)}" for name in versions.CHECKED]
    return Finding("versions", f"tested: {', '.join(found)}")


def _missing() -> str:
    """Return the libraries that are not installed."""
    missing = []
    for name in versions.CHECKED:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return " ".join(missing)
