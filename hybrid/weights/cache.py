"""Keeps converted copies of checkpoints that are loaded without being converted first.

Beside a copy lies a note of the checkpoint and the formats that it was made from. When that
checkpoint changes, a new copy is made and the old one goes, with all that an interrupted
conversion left of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.paths import cache_dir, expanded, make_cache_folder, make_folder, write_whole
from hybrid.weights.checkpoint import Source, convert
from hybrid.weights.gguf_checkpoint import GgufCheckpoint
from hybrid.weights.progress import conversion_progress
from hybrid.weights.side_files import refresh_side_files
from hybrid.weights.store import INDEX_NAME, StoreIndex


def converted_copy(
    source: Path, experts: str | None, dense: str | None, folder: Path | str | None = None
) -> tuple[Path, str]:
    """Return the converted copy of a checkpoint, made on the first call.

    Parameters
    ----------
    source
        The checkpoint: a directory, or a GGUF file.
    experts, dense
        Formats to convert to; None are those that suit the checkpoint.
    folder
        Where copies are kept; the cache folder by default.

    Returns
    -------
    The copy's directory and its store's id. It is found again by the checkpoint's identity
    (content and times of change) and the formats, wherever the checkpoint is moved; tokenizer,
    template and generation settings are those that the checkpoint has now.
    """
    checkpoint = Source.open(source)
    own = isinstance(checkpoint.checkpoint, GgufCheckpoint)
    experts = experts or (None if own else DEFAULT_EXPERTS)
    times = [path.stat().st_mtime_ns for path in checkpoint.files]
    key = json.dumps([checkpoint.identity(), times, experts, dense]).encode()
    home = cache_dir() / "converted" if folder is None else expanded(folder)
    copy = home / f"{checkpoint.name}-{hashlib.sha256(key).hexdigest()[:16]}"
    if copy.exists():  # a cache that is only read, such as one that many share, will do
        if not own:
            refresh_side_files(source, copy)
        return copy, StoreIndex.read(copy / INDEX_NAME).id
    if folder is None:
        make_cache_folder(home.name)
    else:
        make_folder(home, hint="choose a cache_dir that can be written")
    made_from = {"source": str(source.resolve()), "experts": experts, "dense": dense}
    with FileLock(str(_beside(copy, ".wait"))):
        if not copy.exists():
            write_whole(_beside(copy, ".json"), json.dumps(made_from) + "\n")
            with conversion_progress(f"Converting {checkpoint.name}") as progress:
                convert(source, copy, experts=experts, dense=dense, progress=progress, tell=_say)
        with suppress(OSError):  # who waited for it finds the copy; Windows keeps open files
            _beside(copy, ".wait").unlink()
    for note in home.glob("*.json"):
        if note.stem != copy.name and _note(note) == made_from:
            _remove(home / note.stem)
    return copy, StoreIndex.read(copy / INDEX_NAME).id


def _remove(old: Path) -> None:
    """Remove a copy whose checkpoint has changed, unless a conversion is writing it."""
    with suppress(Timeout, OSError), FileLock(str(_beside(old, ".wait")), blocking=False):
        gone = _beside(old, ".removed")  # a half-removed one must not be taken for a copy
        for left in (gone, _beside(old, ".partial")):
            shutil.rmtree(left, ignore_errors=True)
        if old.exists():
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        for ending in (".json", ".lock", ".wait"):
            _beside(old, ending).unlink(missing_ok=True)


def _note(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _beside(copy: Path, ending: str) -> Path:
    return copy.with_name(copy.name + ending)


def _say(note: str) -> None:
    print(f"hybrid: {note}", file=sys.stderr)
