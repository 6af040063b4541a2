"""A hash of source files that changes with their code, not with what is said about it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_TOKENS = re.compile(
    r'^[ \t]*[rR]?"""(?:[^"\\]|\\.|"(?!""))*"""[ \t]*$'  # a docstring: a statement of its own
    r'|(?P<kept>"""(?:[^"\\]|\\.|"(?!""))*"""'
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*')"
    r"|#[^\n]*",
    re.MULTILINE | re.DOTALL,
)
_EMPTY_LINES = re.compile(r"[ \t]*\n(?:[ \t]*\n)*")


def code_only(source: str) -> str:
    """Return Python source without comments, docstrings and empty lines.

    A scan for strings and ``#``, because ``ast`` takes half a second for what a calibration rests
    on. It takes a triple-quoted string on lines of its own for a docstring.
    """
    kept = _TOKENS.sub(lambda found: found["kept"] or "", source)
    return _EMPTY_LINES.sub("\n", kept).strip()


def code_hash(root: Path, places: Iterable[str]) -> str:
    """Hash the code of every file, and of every file under every folder, among ``places``.

    Parameters
    ----------
    places
        Relative to ``root``.
    """
    digest = hashlib.sha256()
    for place in places:
        path = root / place
        files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
        for file in files:
            digest.update(code_only(file.read_text(encoding="utf-8")).encode())
            digest.update(b"\0")
    return digest.hexdigest()[:16]
