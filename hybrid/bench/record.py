"""Writes results to files, a line each, with command, commit, machine and versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import psutil

from cpu_experts.jit import hostcpu
from hybrid import __version__
from hybrid.errors import UsageError
from hybrid.machine import host
from hybrid.paths import can_be_made, write_whole

_LIBRARIES = ("numba", "llvmlite", "numpy", "torch", "transformers")


def provenance(command: str, threads: int) -> dict[str, Any]:
    """Return command, date, commit, machine and versions of a measurement.

    ``commit`` is None outside a checkout; a working tree that differs from its commit is
    marked with ``+changes``.
    """
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": host.cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "simd_level": str(hostcpu.processor()),
            "system": platform.system(),
        },
        "threads": threads,
        "versions": {"hybrid": __version__, "python": platform.python_version(), **versions},
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def spread(samples: list[float]) -> dict[str, Any]:
    """Return median, quartiles and every sample, in seconds."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return {
        "seconds_median": median(ordered),
        "seconds_quartiles": [ordered[quarter], ordered[-1 - quarter]],
        "samples_s": samples,
    }


class Told(Protocol):
    """What a benchmark tells of every row that it has finished."""

    def __call__(self, so_far: dict[str, Any], *lines: str) -> None:
        """Take the record so far and what to say of the rows that are new in it."""
        ...


def untold(so_far: dict[str, Any], *lines: str) -> None:
    """Tell nobody."""


class Line:
    """One run's line in a ``.jsonl`` file, which grows as the run goes on.

    Every version takes the place of the one before. The file is written aside and renamed: it holds
    whole lines at any time, whatever ends the run.

    Parameters
    ----------
    path
        The file; what else is in it stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # a link stays one
        self._written = b""

    def put(self, result: dict[str, Any]) -> None:
        """Write ``result``.

        Raises
        ------
        UsageError
            When the file cannot be written; it is as it was.
        """
        line = (json.dumps(result) + "\n").encode()
        there = self._path.read_bytes() if self._path.exists() else b""
        before, found, after = there.rpartition(self._written) if self._written else (b"", b"", b"")
        if not found:  # the first version, or somebody has taken the last one out
            before, after = there, b""
            if before and not before.endswith(b"\n"):
                before += b"\n"
        write_whole(self._path, before + line + after)
        self._written = line


def check_recordable(path: Path) -> None:
    """Raise UsageError when no line could be put into ``path``: before anything is measured."""
    hint = "check the folder and its permissions"
    try:
        if path.exists():
            if not path.is_file():
                raise UsageError(
                    f"cannot write to {path}: it is no file", hint="name a .jsonl file"
                )
            path.open("ab").close()
        writable = can_be_made(path.resolve())
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}", hint=hint) from error
    if not writable:
        raise UsageError(f"cannot write to {path}: there is no such folder to write in", hint=hint)
