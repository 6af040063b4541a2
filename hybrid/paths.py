"""Where this program keeps files of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
