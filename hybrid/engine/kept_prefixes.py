"""Keeps what is remembered of texts in a file, so that it is there after a restart.

A file is one line of JSON and then the pages, one behind another: which tokens each has, and behind
which other page. The line has a checksum of all of it, and what it is of: the model's weights and
config, the type that it computes in, and how pages are laid out. A file of anything else, or one
that is damaged, is left alone or taken for none.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpu_experts.decoder.pages import PAGE, Pages
from hybrid.engine.prefixes import Known, Prefixes
from hybrid.errors import UsageError
from hybrid.session.model import HybridModel

_FORM = "hybrid prefixes 1"
_LONGEST_LINE = 1 << 30


class KeptPrefixes:
    """The file of one model in a folder.

    Parameters
    ----------
    folder
        Where it is; made if it is not there.
    model
        Whose keys and values are kept.
    size_bytes
        Of the pages in it, at most.

    Raises
    ------
    UsageError
        When there can be no such folder.
    """

    def __init__(self, folder: Path, model: HybridModel, size_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--prefix-cache {folder}: {error.strerror or error}",
                hint="name a folder that can be written",
            ) from error
        config = json.dumps(model.model.config.to_dict(), sort_keys=True, default=str)
        self._of = {
            "weights": model.loaded.weights,
            "config": hashlib.sha256(config.encode()).hexdigest(),
            "dtype": str(model.model.dtype),
        }
        name = hashlib.sha256(json.dumps(self._of).encode()).hexdigest()[:16]
        self.path = folder / f"{name}.prefixes"
        self._size_bytes = size_bytes

    def load(self, pages: Pages, prefixes: Prefixes) -> str:
        """Read what is kept into memory that is free; returns what came of it, in words."""
        try:
            with self.path.open("rb") as file:
                header = self._header(file.readline(_LONGEST_LINE), pages)
                begun = file.tell()
                if _digest(header["nodes"], _pieces(file, pages.page_bytes)) != header["sha256"]:
                    raise ValueError("its checksum is another")
                file.seek(begun)
                known = _read(header["nodes"], file, pages)
        except FileNotFoundError:
            return f"nothing is kept in {self.path} yet"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{self.path} is not used: {error}"
        prefixes.restore(known)
        tokens = sum(len(each.ids) for each in known)
        return f"{tokens} tokens of earlier texts are known from {self.path}"

    def save(self, pages: Pages, prefixes: Prefixes) -> str:
        """Write what was used last, as far as it may; returns what came of it, in words."""
        known = prefixes.latest(self._size_bytes // pages.page_bytes)
        nodes = [[each.behind, list(each.ids)] for each in known]
        contents = [pages.content(each.page) for each in known]
        header = {
            "form": _FORM,
            "of": self._of,
            "page": [PAGE, pages.page_bytes, pages.stored],
            "nodes": nodes,
            "sha256": _digest(nodes, iter(contents)),
        }
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            try:
                with aside.open("wb") as file:
                    file.write(json.dumps(header).encode() + b"\n")
                    for content in contents:
                        file.write(content.data)
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(self.path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        except OSError as error:
            return f"what is known of texts cannot be kept in {self.path}: {error.strerror}"
        return f"{sum(len(each.ids) for each in known)} tokens of texts are kept in {self.path}"

    def _header(self, line: bytes, pages: Pages) -> dict[str, Any]:
        header = json.loads(line)
        if not isinstance(header, dict) or header.get("form") != _FORM:
            raise ValueError("it is no file of prefixes of this version")
        if header["of"] != self._of:
            raise ValueError("it is of other weights or settings")
        if header["page"] != [PAGE, pages.page_bytes, pages.stored]:
            raise ValueError("its pages are laid out otherwise")
        return header


def tell(line: str) -> None:
    """Say on stderr what came of a file."""
    print(f"hybrid: {line}", file=sys.stderr)


def _digest(nodes: Any, contents: Iterator[Any]) -> str:
    found = hashlib.sha256(json.dumps(nodes).encode())
    for content in contents:
        found.update(content)
    return found.hexdigest()


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _read(nodes: Any, file: Any, pages: Pages) -> list[Known]:
    """Return what nodes know, in pages of their own, as long as some are free."""
    known: list[Known] = []
    try:
        for at, (behind, ids) in enumerate(nodes):
            whole = behind == -1 or len(known[behind].ids) == PAGE
            if not (-1 <= behind < at and whole and 1 <= len(ids) <= PAGE):
                raise ValueError("its pages do not follow each other")
            if not pages.free:
                break
            (page,) = pages.take(1)
            known.append(Known(behind, tuple(int(token) for token in ids), page))
            content = file.read(pages.page_bytes)
            if len(content) != pages.page_bytes:
                raise ValueError("it ends in the middle of a page")
            pages.content(page)[:] = np.frombuffer(content, np.uint8)
    except BaseException:
        pages.give(each.page for each in known)
        raise
    return known
