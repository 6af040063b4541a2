"""Says where this program keeps its own files."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from hybrid.errors import DiskSpaceError, UsageError
from planner.describe.words import in_words

_ELSEWHERE = "set HYBRID_CACHE to a folder that can be written"


def cache_dir() -> Path:
    """Return the folder for things that can be made again.

    ``HYBRID_CACHE`` when set, else the platform's own cache folder; not made here.

    Raises
    ------
    UsageError
        When it begins with somebody's home folder and there is none.
    """
    chosen = os.environ.get("HYBRID_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else _platform_cache()
    except RuntimeError as error:
        raise UsageError(
            f"the cache folder {chosen or '~/.cache'} cannot be found: {error}", hint=_ELSEWHERE
        ) from error


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "hybrid"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/hybrid"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"


def expanded(path: str | PathLike[str]) -> Path:
    """Return a path that a user gave, with ``~`` as their home folder.

    Raises
    ------
    UsageError
        When it begins with the home folder of somebody who is not known here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{os.fspath(path)!r} begins with a home folder that is not known",
            hint="give the whole path",
        ) from error


def can_be_made(file: Path) -> bool:
    """Whether a file of this name can be written: tried with one beside it, which goes again.

    Asking for permissions alone does not tell of disks that are read only, nor of full ones.
    """
    try:
        descriptor, probe = tempfile.mkstemp(prefix=".hybrid-", dir=file.parent)
    except OSError:
        return False
    os.close(descriptor)
    os.unlink(probe)
    return True


def make_cache_folder(*parts: str) -> Path:
    """Return a folder of the cache, made if need be.

    Raises
    ------
    UsageError
        When it cannot be made or nothing can be written there.
    """
    return make_folder(cache_dir().joinpath(*parts), hint=_ELSEWHERE)


def make_folder(folder: Path, *, hint: str) -> Path:
    """Make ``folder`` and those above it, unless they exist, and return it.

    Raises
    ------
    UsageError
        When it cannot be made or nothing can be written there, with ``hint``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {folder}: {error.strerror or error}", hint=hint
        ) from error
    if not can_be_made(folder / "file"):
        raise UsageError(f"cannot write to the folder {folder}", hint=hint)
    return folder


def check_temporary_folder() -> None:
    """Refuse to go on without a folder for temporary files, which torch cannot be imported without.

    Raises
    ------
    UsageError
        Naming the folders that were tried, or the one that TMPDIR names in vain.
    """
    asked = os.environ.get("TMPDIR")
    if asked and not can_be_made(Path(asked) / "file"):  # Python would take another, quietly
        raise UsageError(
            f"TMPDIR is {asked!r}, which is no folder that can be written",
            hint="set TMPDIR to a folder that can be written, or unset it",
        )
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no folder for temporary files: {error.strerror}",
            hint="set TMPDIR to a folder that can be written",
        ) from error


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Give a folder for temporary files whose name says ``what`` they are for; it goes away again.

    Where files in use cannot be removed, as on Windows, they are no error.

    Raises
    ------
    UsageError
        When there is no place for one.
    DiskSpaceError
        When its disk is full.
    """
    check_temporary_folder()
    prefix = f"hybrid-{what}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskSpaceError(
                f"the disk of {Path(folder).parent} is full",
                hint="free some space there, or set TMPDIR to a folder on another disk",
            ) from error


def check_writable(
    option: str,
    file: Path | None,
    *,
    replaced: bool = False,
    remedy: str = "choose another name, or delete it",
) -> None:
    """Refuse a file that could not be written at the end, before anything takes long.

    Parameters
    ----------
    option
        What the file was given by.
    file
        None is no file.
    replaced
        Whether one that exists may be written over, or added to.
    remedy
        What helps where it may not.

    Raises
    ------
    UsageError
        Naming the option and the file.
    """
    if file is None:
        return
    try:
        if file.is_dir():
            raise UsageError(f"{option} '{file}' is a folder", hint=f"give {option} a file's name")
        if file.exists() and not replaced:
            raise UsageError(f"{option} {file} exists already", hint=remedy)
    except OSError as error:  # such as a name that is too long
        raise UsageError(
            f"{option} {file} cannot be used: {error.strerror}", hint="choose another name"
        ) from error
    if not can_be_made(file):
        raise UsageError(
            f"{option} {file}: cannot write to {file.parent}",
            hint="choose a folder that exists and is yours",
        )


def require_room(folder: Path, wanted: int, what: str, *, hint: str) -> None:
    """Refuse to write ``wanted`` bytes to a folder, or what will be one, whose disk has fewer.

    Raises
    ------
    DiskSpaceError
        With both; ``what`` is what takes them, such as "the model takes {}".
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise DiskSpaceError(
            f"{folder} has {in_words(free)} free, {what.format(in_words(wanted))}", hint=hint
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` whole or not at all: aside, flushed, then renamed.

    Raises
    ------
    UsageError
        When the place cannot be written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            with aside.open("wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:  # Ctrl-C leaves nothing behind, either
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}", hint="choose a place that exists"
        ) from error
