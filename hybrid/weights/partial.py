"""Manages the directory that a conversion works in until everything is on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from hybrid.errors import DiskSpaceError, UsageError

_JOURNAL = "conversion.jsonl"
_BESIDE = "choose a folder beside it"


def destination(src: Path, dst: Path) -> Path:
    """Return the directory that a conversion to ``dst`` makes, links followed.

    An empty folder is replaced by the finished one, so it must be one that can be.

    Raises
    ------
    UsageError
        When it exists, lies in the source, or cannot be replaced.
    """
    try:
        place = Path(os.path.realpath(dst))
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise UsageError(f"{dst} exists", hint="choose another destination, or remove it first")
        if place.is_relative_to(os.path.realpath(src)):
            raise UsageError(f"{dst} lies in {src}, which is converted", hint=_BESIDE)
        if place.exists():
            _check_replaceable(dst, place)
    except OSError as error:
        raise _unwritable(dst, error) from error
    return place


def _check_replaceable(dst: Path, place: Path) -> None:
    """Refuse an empty folder that cannot get out of the way: a mounted disk, the working folder."""
    if place.samefile(os.getcwd()):
        raise UsageError(f"{dst} is the working folder", hint="name a new folder in it")
    aside = place.with_name(f"{place.name}.{os.getpid()}.moved")
    try:
        if os.path.ismount(place):
            raise OSError(errno.EBUSY, "a disk is mounted there")
        place.rename(aside)
        aside.rename(place)
    except OSError as error:
        raise UsageError(
            f"the folder {dst} cannot be replaced by the converted one: {error.strerror or error}",
            hint=f"name a new folder in it: {dst / 'model'}",
        ) from error


class Partial:
    """``DST.partial``: locked while in use, with a journal of what is complete.

    The journal's first line names the plan (store id); an entry follows for each layer of
    experts when its bytes are on disk. A partial of another plan is thrown away.
    """

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        self.path = dst.with_name(dst.name + ".partial")
        self._lock = FileLock(str(dst.with_name(dst.name + ".lock")))
        self._checksums: dict[str, list[int]] = {}

    def __enter__(self) -> Partial:
        try:
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UsageError(
                f"another conversion is writing {self.dst}", hint="wait until it is done"
            ) from None
        except OSError as error:
            raise _unwritable(self.dst, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # where an open file cannot be removed, the release does it
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    @property
    def nbytes(self) -> int:
        """Bytes that the directory takes on disk already."""
        return sum(_allocated(path) for path in self.path.iterdir())

    def begin(self, plan_id: str) -> None:
        """Take over what an interrupted run of the same plan left, or start afresh.

        Raises
        ------
        UsageError
            When there is a directory of this name that no conversion made.
        """
        journal = self.path / _JOURNAL
        if self.path.exists() and any(self.path.iterdir()) and not journal.exists():
            raise UsageError(
                f"{self.path} exists and was not made by a conversion",
                hint="move it away, or choose another destination",
            )
        entries = _read_entries(journal)
        if entries[:1] == [{"plan": plan_id}]:
            self._checksums = {entry["module"]: entry["checksums"] for entry in entries[1:]}
            return
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir()
            self._append({"plan": plan_id})
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def checksums(self, module: str) -> list[int] | None:
        """Checksums of a layer that was completed before, if it was."""
        return self._checksums.get(module)

    def layer_done(self, module: str, checksums: list[int]) -> None:
        """Note that a layer's bytes are on disk (the caller has synced them)."""
        self._append({"module": module, "checksums": checksums})

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.path / _JOURNAL).open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Flush everything and give the directory its final name."""
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                sync(path)
        sync(self.path)
        if self.dst.exists():
            self.dst.rmdir()
        self.path.rename(self.dst)
        (self.dst / _JOURNAL).unlink()
        sync(self.dst.parent)


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a typed error; what is complete stays for the next run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(
            f"the disk of {path} is full",
            hint="free some space and run the same command again: it goes on from there",
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or on systems that can a directory, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _allocated(path: Path) -> int:
    """Bytes on disk: less than the size where a file has holes."""
    stat = path.stat()
    return min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512)


def _read_entries(journal: Path) -> list[dict[str, Any]]:
    """The journal's lines; one that was cut off by a crash ends it."""
    entries = []
    try:
        for line in journal.read_text().splitlines():
            entries.append(json.loads(line))
    except (OSError, ValueError, RecursionError):
        pass
    whole = all(isinstance(e, dict) and {"module", "checksums"} <= e.keys() for e in entries[1:])
    return entries if whole else []


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path}: {error.strerror or error}",
        hint="choose a destination that you may write to",
    )
