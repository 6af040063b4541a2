"""What every recorded result says of how it came about, and appending it to a file."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from cpu_experts import hostcpu
from hybrid import __version__, host
from hybrid.errors import UsageError


def provenance(command: str, threads: int) -> dict[str, Any]:
    """Return command, date, commit, machine and versions of a measurement.

    ``commit`` is None outside a checkout; a working tree that differs from its commit is
    marked with ``+changes``.
    """
    versions = {name: metadata.version(name) for name in ("numba", "llvmlite", "numpy", "torch")}
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


def append(result: dict[str, Any], path: Path) -> None:
    """Add ``result`` as one line to a ``.jsonl`` file, whole or not at all."""
    line = (json.dumps(result) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "the line was not written as a whole", str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def check_appendable(path: Path) -> None:
    """Raise UsageError when no line could be appended to ``path``: before anything is measured."""
    hint = "check the folder and its permissions"
    try:
        if path.exists():
            path.open("ab").close()
            return
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}", hint=hint) from error
    if not writable:
        raise UsageError(f"cannot write to {path}: there is no such folder to write in", hint=hint)
