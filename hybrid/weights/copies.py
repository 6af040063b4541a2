"""The converted copies in the cache: which there are, what they were made of, and their removal.

Beside a copy lies a note of what it was made from; when that was last used is when the note was
last touched. Loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybrid.ask.sizes import parse_bytes
from hybrid.errors import StoreError, UsageError
from hybrid.hub.names import repo_of
from hybrid.paths import cache_dir
from hybrid.weights.store import INDEX_NAME, StoreIndex
from planner.describe.words import in_words

#: The environment variable that says how much all copies may take.
LIMIT = "HYBRID_CACHE_LIMIT"
#: Letters of the digest that ends a copy's name, and the dash before it.
_DIGEST = 17


@dataclass(frozen=True)
class KeptCopy:
    """A converted copy of a model.

    Attributes
    ----------
    path
        Where it lies, or will once it is whole.
    source
        What it was made of; empty where nothing says so.
    experts, dense
        The formats that were asked for; None is what suited the model.
    nbytes
        On disk.
    used_s
        When it was last used, in seconds since 1970.
    whole
        Whether it was made to the end.
    """

    path: Path
    source: str
    experts: str | None
    dense: str | None
    nbytes: int
    used_s: float
    whole: bool

    @property
    def name(self) -> str:
        """What the model is called: without the digest that tells its copies apart."""
        return self.path.name[:-_DIGEST]

    @property
    def called(self) -> str:
        """What its source is called: a name of the hub, or a path."""
        return repo_of(Path(self.source)) or self.source

    @property
    def can_be_made_again(self) -> bool:
        """Whether what it was made of is still there."""
        return bool(self.source) and Path(self.source).exists()


def copies_folder() -> Path:
    """Where copies are kept unless asked otherwise."""
    return cache_dir() / "converted"


def kept_copies() -> list[KeptCopy]:
    """Return all copies in the cache, whole or not, last used first."""
    home = copies_folder()
    if not home.is_dir():
        return []
    found = []
    for note in home.glob("*.json"):
        copy, made_from = home / note.stem, note_of(note)
        whole = copy.is_dir()
        if len(copy.name) <= _DIGEST or not isinstance(made_from, dict):
            continue
        with suppress(OSError):  # removed meanwhile
            found.append(
                KeptCopy(
                    path=copy,
                    source=_text(made_from.get("source")) or "",
                    experts=_text(made_from.get("experts")),
                    dense=_text(made_from.get("dense")),
                    nbytes=_size(copy if whole else beside(copy, ".partial")),
                    used_s=note.stat().st_mtime,
                    whole=whole,
                )
            )
    return sorted(found, key=lambda copy: -copy.used_s)


@dataclass(frozen=True)
class Formats:
    """Formats that a copy's weights are kept in, most of them first.

    Attributes
    ----------
    experts
        Of layers with experts, as one word each (``Block.format_name``).
    dense
        Of other matrices that are packed; all else is as the model has it.
    """

    experts: tuple[str, ...]
    dense: tuple[str, ...]


def formats_of(copy: KeptCopy) -> Formats | None:
    """Return the formats of a copy; None of one that is not whole, or damaged."""
    try:
        index = StoreIndex.read(copy.path / INDEX_NAME)
    except StoreError:
        return None
    experts = Counter(layer.shape(index.format).format_name for layer in index.layers)
    dense = Counter(str(index.format_of(path)) for path in index.dense)
    return Formats(
        tuple(name for name, _ in experts.most_common()),
        tuple(name for name, _ in dense.most_common()),
    )


def cache_limit() -> int | None:
    """Return how many bytes all copies may take, as ``HYBRID_CACHE_LIMIT`` says; None for any.

    Raises
    ------
    UsageError
        When it is no size.
    """
    limit = os.environ.get(LIMIT)
    return parse_bytes(limit, LIMIT) if limit else None


def keep_to_limit(most: int, used: Path, tell: Callable[[str], None]) -> None:
    """Remove the copies that were not used for longest until all take ``most`` bytes.

    Only whole copies that can be made again go, and never ``used``.
    """
    copies = kept_copies()
    taken = sum(copy.nbytes for copy in copies)
    for copy in reversed(copies):
        if taken <= most:
            return
        if copy.path == used or not copy.whole or not copy.can_be_made_again:
            continue
        with suppress(UsageError):  # being made by another program, or of another user
            remove_copy(copy.path)
            taken -= copy.nbytes
            tell(
                f"removed {copy.path.name} ({in_words(copy.nbytes)}), the copy not used for "
                f"longest: {LIMIT} is {in_words(most)}"
            )
    if taken > most:
        tell(
            f"the cache takes {in_words(taken)}, {LIMIT} is {in_words(most)}: no other copy can "
            "be made again"
        )


def touch(copy: Path) -> None:
    """Remember that a copy was used now; a cache that is only read remembers nothing."""
    with suppress(OSError):
        os.utime(beside(copy, ".json"))


def remove_copy(old: Path) -> None:
    """Remove a copy and all that lies beside it.

    Raises
    ------
    UsageError
        When a conversion is writing it, or it cannot be removed.
    """
    try:
        with FileLock(str(beside(old, ".wait")), blocking=False):
            gone = beside(old, ".removed")  # a half-removed one must not be taken for a copy
            for left in (gone, beside(old, ".partial")):
                shutil.rmtree(left, ignore_errors=True)
            if old.exists():
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
            for ending in (".json", ".lock", ".wait"):
                beside(old, ending).unlink(missing_ok=True)
    except Timeout as error:
        raise UsageError(
            f"{old.name} is being converted by another program", hint="wait until it is done"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{old} cannot be removed: {error.strerror or error}",
            hint="check who may write in that folder",
        ) from error


def note_of(file: Path) -> Any:
    """Return what a copy was made from, as it was noted; None where that is damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def beside(copy: Path, ending: str) -> Path:
    """Return the path of a file beside a copy."""
    return copy.with_name(copy.name + ending)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
