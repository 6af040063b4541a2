"""Where this program keeps files of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hybrid.errors import UsageError


def cache_dir() -> Path:
    """Return the folder for things that can be made again.

    ``HYBRID_CACHE`` when set, else the platform's own cache folder; not created here.
    """
    chosen = os.environ.get("HYBRID_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "hybrid"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/hybrid"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all: aside, flushed, then renamed.

    Raises
    ------
    UsageError
        When the place cannot be written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
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
