"""What of this machine a process may use: control groups of either version, ``ulimit``, core kinds.

Everything is read below a root folder, so that machines can be made up. Loads neither torch nor
numba.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 2**60
"""Version 1 writes no limit as the largest number of whole pages."""
_ATOM_SPEED = 0.6
"""An E core's work per cycle beside a P core's, where the kernel tells no capacities: assumed."""


class Limit(NamedTuple):
    """The tightest of several limits, and what sets it."""

    value: float
    origin: str


def cpu_limit(root: Path = Path("/")) -> Limit | None:
    """Return the processors that control groups grant; None where they set no limit."""
    return _tightest(_each(root, "cpu", _cpus))


def memory_limit(root: Path = Path("/")) -> Limit | None:
    """Return the bytes that control groups and ``ulimit`` grant; None where they set no limit."""
    return _tightest([*_each(root, "memory", _bytes_granted), *_own_limits(left=False)])


def memory_left(root: Path = Path("/")) -> Limit | None:
    """Return the bytes of those limits that can still be taken.

    Pages of files that can be read again count as free.
    """
    return _tightest([*_each(root, "memory", _bytes_left), *_own_limits(left=True)])


def core_speeds(root: Path = Path("/")) -> list[float]:
    """Return the relative speed of each physical core that this process may use, fastest first.

    Empty where the operating system tells nothing of them.
    """
    cores: dict[str, float] = {}
    atoms = _listed(_text(root / "sys/devices/cpu_atom/cpus") or "")
    for cpu in _allowed():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        core = _text(folder / "topology/thread_siblings_list")
        if core is None:
            return []
        capacity = _number(folder / "cpu_capacity")
        speed = capacity or _number(folder / "cpufreq/cpuinfo_max_freq") or 1.0
        if capacity is None and cpu in atoms:
            speed *= _ATOM_SPEED
        cores[core] = max(speed, cores.get(core, 0.0))
    return sorted(cores.values(), reverse=True)


def fastest_number(speeds: Sequence[float]) -> int:
    """Return how many of the cores, fastest first, finish equal shares of a work soonest.

    The slowest that takes part is what all wait for.
    """
    return max(range(1, len(speeds) + 1), key=lambda number: number * speeds[number - 1])


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _listed(text: str) -> set[int]:
    """Return the numbers of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _tightest(limits: Sequence[Limit]) -> Limit | None:
    return min(limits, default=None, key=lambda limit: limit.value)


def _each(root: Path, controller: str, read: Callable[[Path], float | None]) -> list[Limit]:
    """Return what ``read`` finds in this process's groups of a controller and all above them."""
    return [
        Limit(value, f"control group {folder.relative_to(root)}")
        for folder in _groups(root, controller)
        if (value := read(folder)) is not None
    ]


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups, innermost first, up to where they are mounted.

    In a container a group may lie outside what is mounted; the mounted folder is then its own.
    """
    paths: dict[str, str] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)  # version 2 names none
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            path = paths.get("", "/")
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(controller, "/")
        else:
            continue
        base, at = left.split(" ")[3:5]
        mounted = root / at.lstrip("/")
        inside = os.path.relpath(path, base)
        group = mounted if inside.startswith("..") else mounted / inside
        if not group.is_dir():
            group = mounted
        yield group
        yield from (above for above in group.parents if above.is_relative_to(mounted))


def _cpus(group: Path) -> float | None:
    words = (_text(group / "cpu.max") or "").split()
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _bytes_granted(group: Path) -> float | None:
    """Return the limit; above ``memory.high`` a group is slowed down until it hardly moves."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    found = [value for name in names if (value := _number(group / name)) is not None]
    return min((value for value in found if value < _UNLIMITED), default=None)


def _bytes_left(group: Path) -> float | None:
    limit = _bytes_granted(group)
    if limit is None:
        return None
    used = _number(group / "memory.current")
    prefix = ""
    if used is None:
        used, prefix = _number(group / "memory.usage_in_bytes"), "total_"
    counts = dict(
        line.split(" ", 1) for line in (_text(group / "memory.stat") or "").splitlines() if line
    )
    files = sum(int(counts.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    return min(limit, max(0.0, limit - (used or 0.0) + files))


def _own_limits(*, left: bool) -> list[Limit]:
    """Return what ``ulimit -v`` and ``ulimit -d`` grant this process, or leave it."""
    if sys.platform == "win32":
        return []
    import resource

    import psutil

    found = []
    kinds = (("RLIMIT_AS", "ulimit -v", "vms"), ("RLIMIT_DATA", "ulimit -d", "data"))
    for kind, name, use in kinds:
        limit = resource.getrlimit(getattr(resource, kind))[0]
        if limit in (resource.RLIM_INFINITY, -1) or limit >= _UNLIMITED:
            continue
        used = getattr(psutil.Process().memory_info(), use, 0) if left else 0
        found.append(Limit(max(0, limit - used), name))
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> float | None:
    """Return a file's number; None where there is none, such as ``max``."""
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
