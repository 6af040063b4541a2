"""``hybrid env``: what this machine and this installation offer. Loads neither torch nor numba."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

import hybrid
from cpu_experts.jit import hostcpu
from hybrid.cli.verdict import Finding, in_one_line, verdict, wrong_switch
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.machine import calibrations, host, limits
from hybrid.paths import cache_dir

_GIB = 1 << 30
_PACKAGES = ("torch", "transformers", "numpy", "numba", "llvmlite", "tokenizers", "safetensors")
_VARIABLES = (
    "HYBRID_SIMD",
    "HYBRID_CACHE",
    "HYBRID_CACHE_LIMIT",
    "NUMBA_CACHE_DIR",
    "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
    "OMP_NUM_THREADS",
    "HF_HOME",
)


@dataclass(frozen=True)
class Environment:
    """Everything ``hybrid env`` shows; sizes are in bytes.

    Attributes
    ----------
    versions
        Installed version of each package, ``"not installed"`` where there is none.
    cpu
        Name, cores, vector features, the SIMD level in use and the levels that can run, the units
        for bfloat16 that count as there and those that are.
    threads
        Threads that torch and the kernels use unless told otherwise.
    limits
        What of the machine this process may not use, and what sets that, where anything does.
    variables
        The environment variables that change any of this, where set.
    calibration
        The file that ``hybrid calibrate`` wrote for this machine and its main numbers; what is
        wrong with it, or how to make one.
    verdict
        What all that means for how fast models run here.
    """

    versions: dict[str, str]
    system: str
    cpu: dict[str, Any]
    threads: int
    memory: dict[str, int]
    limits: dict[str, str]
    gpus: list[host.Gpu]
    paths: dict[str, str]
    variables: dict[str, str]
    calibration: dict[str, str]
    verdict: tuple[Finding, ...]


def collect() -> Environment:
    """Ask the operating system and the installation."""
    wrong = wrong_switch()
    features, processor = hostcpu.host_features(), hostcpu.processor()
    memory = psutil.virtual_memory()
    return Environment(
        versions={"hybrid": hybrid.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        system=platform.platform(),
        cpu={
            "name": host.cpu_name(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": os.cpu_count(),
            "features": sorted(features),
            "simd_level": processor.kernels,
            "simd_levels": list(hostcpu.available_levels(features)),
            "bf16_units": sorted(processor.units),
            "bf16_units_there": sorted(hostcpu.actual().units),
        },
        threads=host.default_threads(),
        memory={"total": memory.total, "available": host.available_memory_bytes()},
        limits=_limits(),
        gpus=host.gpus(),
        paths={
            "python": sys.executable,
            "package": str(Path(hybrid.__file__).parent),
            "demo model": str(demo_path()),
            "cache": str(cache_dir()),
        },
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        calibration=_calibration() | _device_calibrations(),
        verdict=(*wrong, *verdict()),
    )


def _limits() -> dict[str, str]:
    """Tell the tightest limits of processors and memory, and cores that are left idle."""
    found = {}
    if cpus := limits.cpu_limit():
        found["CPU limit"] = f"{cpus.value:g} processors ({cpus.origin})"
    if memory := host.limited_memory():
        found["memory limit"] = f"{memory.value / _GIB:.1f} GiB ({memory.origin})"
    speeds = limits.core_speeds()
    if speeds and speeds[-1] < speeds[0]:
        fast = limits.fastest_number(speeds)
        found["core kinds"] = (
            f"the slowest is {speeds[-1] / speeds[0]:.0%} as fast as the fastest: "
            f"{fast} of {len(speeds)} share the work"
        )
    return found


def _calibration() -> dict[str, str]:
    """Tell the calibration in force; a damaged one is told, too, and stops nothing else."""
    identity = calibrations.Identity.of_this_machine()
    try:
        spec = calibrations.load(identity)
    except UsageError as error:
        return {"calibration": f"damaged: {error.message}; {error.hint}"}
    if spec is None and calibrations.alone() is not None:
        return {"calibration": "none of the CPU alone: the CPU's part of those below counts"}
    if spec is None:
        return {"calibration": f"none: {calibrations.missing(identity)}; {calibrations.REMEDY}"}
    return {"calibration": f"{identity.path}: {spec.summary}"} | {
        f"  {name}": text for name, text in calibrations.main_numbers(spec)
    }


def _device_calibrations() -> dict[str, str]:
    """Tell the calibrations with a device, a damaged one, too."""
    lines: dict[str, str] = {}
    for identity in calibrations.with_devices():
        name = f"with {identity.device}"
        try:
            spec = calibrations.load(identity)
        except UsageError as error:
            lines[name] = f"damaged: {error.message}; {error.hint}"
            continue
        if spec is not None:
            lines[name] = f"{identity.path}: {spec.summary}"
            numbers = dict(calibrations.main_numbers(spec))
            lines |= {f"  {key} ": numbers[key] for key in ("device", "on the device")}
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe(environment: Environment) -> str:
    """Return ``environment`` as aligned lines."""
    cpu, memory = environment.cpu, environment.memory
    forced = " (set by HYBRID_SIMD)" if environment.variables.get("HYBRID_SIMD") else ""
    rows = [
        *environment.versions.items(),
        ("system", environment.system),
        ("CPU", cpu["name"]),
        ("cores", f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical"),
        ("SIMD level", f"{cpu['simd_level']}{forced}; can run {', '.join(cpu['simd_levels'])}"),
        ("bfloat16 units", _describe_units(cpu["bf16_units"], cpu["bf16_units_there"])),
        ("features", " ".join(filter(_is_vector_feature, cpu["features"]))),
        ("threads", str(environment.threads)),
        (
            "memory",
            f"{memory['total'] / _GIB:.1f} GiB, {memory['available'] / _GIB:.1f} GiB available",
        ),
        *environment.limits.items(),
        *(("GPU", text) for text in list(map(_describe_gpu, environment.gpus)) or ["none found"]),
        *environment.paths.items(),
        *environment.variables.items(),
        *environment.calibration.items(),
        ("", ""),
        ("verdict", in_one_line(environment.verdict)),
        *((f"  {finding.what}", str(finding)) for finding in environment.verdict),
    ]
    return "\n".join(f"{name:<18} {value}".rstrip() for name, value in rows)


def _describe_units(counted: list[str], there: list[str]) -> str:
    """Say which units count, and which are there where ``HYBRID_SIMD`` says otherwise."""
    said = ", ".join(counted) or "none"
    if counted == there:
        return said
    return f"{said} (set by HYBRID_SIMD; this processor has {', '.join(there) or 'none'})"


def _describe_gpu(gpu: host.Gpu) -> str:
    memory = "" if gpu.memory_bytes is None else f", {gpu.memory_bytes / _GIB:.1f} GiB"
    return f"{gpu.name}{memory}" + (f", driver {gpu.driver}" if gpu.driver else "")


def _is_vector_feature(name: str) -> bool:
    """Tell the features that arithmetic is made of from the many others."""
    return name.startswith(("avx", "amx", "fma", "f16c", "neon", "sve", "dotprod", "i8mm", "bf16"))


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Exit with 1 where something is slower than it could be here."
        ),
    ] = False,
) -> None:
    """Show what this machine and installation offer, and what that means for speed."""
    environment = collect()
    if as_json:
        print(json.dumps(asdict(environment), indent=2))
    else:
        print(describe(environment))
    if check and any(finding.slower for finding in environment.verdict):
        raise typer.Exit(1)
