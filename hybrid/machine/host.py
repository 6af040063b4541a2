"""What this machine has: cores, memory, GPUs. Loads neither torch nor numba.

Everything here is asked of the operating system; nothing is estimated.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from cpu_experts.jit import hostcpu
from hybrid.ask.counts import whole_number
from hybrid.ask.sizes import at_most

_GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_NVIDIA_SMI_TIMEOUT_S = 10
_MOST = "NUMBA_NUM_THREADS sets the most there can be"


@dataclass(frozen=True)
class Gpu:
    """One graphics processor; ``memory_bytes`` and ``driver`` are None where not told."""

    name: str
    memory_bytes: int | None
    driver: str | None


def usable_cores() -> int:
    """Return how many physical cores this process may keep busy.

    The smallest of the machine's physical cores, the process's CPU affinity and, in a
    container, the control group's CPU quota.
    """
    logical = os.cpu_count() or 1
    cores = psutil.cpu_count(logical=False) or logical
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = _cgroup_cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def default_threads() -> int:
    """Return how many threads to compute with: ``OMP_NUM_THREADS`` if set, else every core.

    No more than :func:`most_threads`: what the environment asks all programs for may be too many
    for this one, which is said once on stderr.
    """
    asked, most = _number_in("OMP_NUM_THREADS"), most_threads()
    if asked is None:
        return min(usable_cores(), most)
    if asked > most:
        _say_too_many(asked, most)
    return min(asked, most)


def most_threads() -> int:
    """Return the most threads that the kernels can have, as numba counts them when it is loaded.

    ``NUMBA_NUM_THREADS`` if set, else as many as this process may run at once, physical or not.
    """
    chosen = _number_in("NUMBA_NUM_THREADS")
    if chosen is not None:
        return chosen
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _number_in(variable: str) -> int | None:
    """Return the threads that an environment variable asks for; None where it names none.

    OpenMP's may list those of teams within teams, too; the first number is the outermost team's.
    """
    text = os.environ.get(variable, "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


@cache
def _say_too_many(asked: int, most: int) -> None:
    print(
        f"hybrid: OMP_NUM_THREADS is {asked}, {most} threads are used; {_MOST}",
        file=sys.stderr,
    )


def check_threads(threads: int, most: int) -> int:
    """Return ``threads``; raise UsageError unless it is from 1 to numba's ``most``."""
    return whole_number(threads, "threads", most=most, hint=_MOST)


def has_native_bf16() -> bool:
    """Whether this processor counts as one that multiplies bfloat16 natively.

    ``HYBRID_SIMD`` can hide its units or have them counted as there, see
    :mod:`cpu_experts.jit.hostcpu`.
    """
    return bool(hostcpu.processor().units)


def _cgroup_cpu_quota() -> float | None:
    """Return the CPUs that the control group grants, None when it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def checked_ram(asked: int | None) -> int | None:
    """Return how much of this machine's memory to use; None is all there is.

    Raises
    ------
    UsageError
        When more is asked for than this machine has.
    """
    total = psutil.virtual_memory().total
    return None if asked is None else at_most(asked, total, "ram", "this machine")


def available_memory_bytes() -> int:
    """Return the memory that can still be taken without swapping.

    What the operating system says is available, and in a container no more than what its control
    group has left; pages of files that can be read again count as free in both.
    """
    free = int(psutil.virtual_memory().available)
    left = _cgroup_memory_left()
    return free if left is None else min(free, left)


def _cgroup_memory_left() -> int | None:
    """Return what the control group's memory limit leaves, None when it sets no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(counts[name]) for name in ("inactive_file", "active_file"))
        return None if limit == "max" else max(0, int(limit) - used + reclaimable)
    except (OSError, ValueError, KeyError):
        return None


def peak_memory_bytes() -> int:
    """Return the most memory this process has had resident, mapped files included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpus() -> list[Gpu]:
    """Return the GPUs: from ``nvidia-smi`` where it works, from the PCI devices elsewhere."""
    return _nvidia_gpus() or _pci_gpus()


def _nvidia_gpus() -> list[Gpu]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(answer.stdout)


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Read ``name, memory.total [MiB], driver_version`` rows; memory can be ``[N/A]``."""
    found = []
    for row in filter(str.strip, text.splitlines()):
        name, memory, driver = (cell.strip() for cell in row.rsplit(",", 2))
        found.append(Gpu(name, int(memory) << 20 if memory.isdigit() else None, driver))
    return found


def _pci_gpus() -> list[Gpu]:
    found = []
    for card in sorted(Path("/sys/class/drm").glob("card[0-9]*/device/vendor")):
        if "-" in card.parts[-3]:  # a connector of a card, not a card
            continue
        vendor = _GPU_VENDORS.get(card.read_text().strip())
        if vendor:
            found.append(Gpu(f"{vendor} graphics ({card.parts[-3]})", None, None))
    return found
