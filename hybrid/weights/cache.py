"""Keeps converted copies of checkpoints that are loaded without being converted first.

Beside a copy lies a note of the checkpoint and the formats that it was made from. When that
checkpoint changes, a new copy is made and the old one goes, with all that an interrupted
conversion left of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.errors import UsageError
from hybrid.paths import expanded, make_cache_folder, make_folder, write_whole
from hybrid.weights.checkpoint import convert
from hybrid.weights.copies import (
    beside,
    cache_limit,
    copies_folder,
    keep_to_limit,
    note_of,
    remove_copy,
    touch,
)
from hybrid.weights.declared_formats import is_coded
from hybrid.weights.gguf_checkpoint import GgufCheckpoint
from hybrid.weights.progress import conversion_progress
from hybrid.weights.side_files import refresh_side_files
from hybrid.weights.source import Source
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
    keeps = own or is_coded(checkpoint.path, checkpoint.raw_config)
    experts = experts or (None if keeps else DEFAULT_EXPERTS)
    times = [path.stat().st_mtime_ns for path in checkpoint.files]
    key = json.dumps([checkpoint.identity(), times, experts, dense]).encode()
    home = copies_folder() if folder is None else expanded(folder)
    copy = home / f"{checkpoint.name}-{hashlib.sha256(key).hexdigest()[:16]}"
    if copy.exists():  # a cache that is only read, such as one that many share, will do
        if not own:
            refresh_side_files(source, copy)
        touch(copy)
        return copy, StoreIndex.read(copy / INDEX_NAME).id
    limit = cache_limit() if folder is None else None
    if folder is None:
        make_cache_folder(home.name)
    else:
        make_folder(home, hint="choose a cache_dir that can be written")
    made_from = {"source": str(source.resolve()), "experts": experts, "dense": dense}
    with FileLock(str(beside(copy, ".wait"))):
        if not copy.exists():
            write_whole(beside(copy, ".json"), json.dumps(made_from) + "\n")
            with conversion_progress(f"Converting {checkpoint.name}") as progress:
                convert(source, copy, experts=experts, dense=dense, progress=progress, tell=_say)
        with suppress(OSError):  # who waited for it finds the copy; Windows keeps open files
            beside(copy, ".wait").unlink()
    for note in home.glob("*.json"):
        if note.stem != copy.name and note_of(note) == made_from:
            with suppress(UsageError):  # of a conversion that is under way, or of another user
                remove_copy(home / note.stem)
    if limit is not None:
        keep_to_limit(limit, copy, _say)
    return copy, StoreIndex.read(copy / INDEX_NAME).id


def _say(note: str) -> None:
    print(f"hybrid: {note}", file=sys.stderr)
