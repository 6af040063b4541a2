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
from hybrid.machine import limits

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
    """Return how many physical cores this process does best to keep busy.

    Of those that its CPU affinity leaves, as many as finish equal shares of a work soonest (with
    cores of two kinds those may be the fast ones alone), and no more than the control groups' CPU
    quota.
    """
    speeds = limits.core_speeds()
    if speeds:
        cores = limits.fastest_number(speeds)
    else:
        cores = min(psutil.cpu_count(logical=False) or most_logical(), most_logical())
    quota = limits.cpu_limit()
    return max(1, cores if quota is None else min(cores, int(quota.value)))


def most_logical() -> int:
    """Return how many processors this process may run on at once, physical or not."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


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
    return most_logical() if chosen is None else chosen


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
        When more is asked for than this machine has, or this process may take.
    """
    if asked is None:
        return None
    limit = limited_memory()
    holder = "this machine" if limit is None else f"this process ({limit.origin})"
    return at_most(asked, memory_bytes(), "ram", holder)


def limited_memory() -> limits.Limit | None:
    """Return the limit on this process's memory, where it grants less than the machine has."""
    limit = limits.memory_limit()
    return limit if limit and limit.value < psutil.virtual_memory().total else None


def memory_bytes() -> int:
    """Return the memory that this process may take in all: the machine's, or the tightest limit."""
    limit = limited_memory()
    return int(psutil.virtual_memory().total if limit is None else limit.value)


def available_memory_bytes() -> int:
    """Return the memory that can still be taken without swapping.

    What the operating system says is available, and no more than what control groups and
    ``ulimit`` leave; pages of files that can be read again count as free in all of them.
    """
    free, left = int(psutil.virtual_memory().available), limits.memory_left()
    return free if left is None else min(free, int(left.value))


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
