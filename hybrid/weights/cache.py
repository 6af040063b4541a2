"""Keeps converted copies of checkpoints that are loaded without being converted first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from filelock import FileLock

from hybrid.paths import cache_dir, make_cache_folder, make_folder
from hybrid.weights.checkpoint import Source, convert
from hybrid.weights.progress import conversion_progress
from hybrid.weights.store import INDEX_NAME, StoreIndex


def converted_copy(
    source: Path, experts: str, dense: str | None, folder: Path | str | None = None
) -> tuple[Path, str]:
    """Return the converted copy of a checkpoint, made on the first call.

    Parameters
    ----------
    source
        The checkpoint directory.
    experts, dense
        Formats to convert to.
    folder
        Where copies are kept; the cache folder by default.

    Returns
    -------
    The copy's directory and its store's id. It is found again by the checkpoint's identity
    (content and times of change) and the formats, wherever the checkpoint is moved.
    """
    checkpoint = Source.open(source)
    times = [path.stat().st_mtime_ns for path in checkpoint.files]
    key = json.dumps([checkpoint.identity(), times, experts, dense]).encode()
    home = cache_dir() / "converted" if folder is None else Path(folder).expanduser()
    copy = home / f"{checkpoint.name}-{hashlib.sha256(key).hexdigest()[:16]}"
    if not copy.exists():  # a cache that is only read, such as one that many share, will do
        if folder is None:
            make_cache_folder(home.name)
        else:
            make_folder(home, hint="choose a cache_dir that can be written")
        with FileLock(str(home / f"{copy.name}.wait")):
            if not copy.exists():
                with conversion_progress(f"Converting {checkpoint.name}") as progress:
                    convert(source, copy, experts=experts, dense=dense, progress=progress)
    return copy, StoreIndex.read(copy / INDEX_NAME).id
