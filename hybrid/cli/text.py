"""The text on stdout, and what stderr says beside it, on lines of its own."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_open = False
"""Whether the text's last line has not ended."""


def write(piece: str) -> None:
    """Put ``piece`` on stdout at once."""
    global _open
    sys.stdout.write(piece)
    sys.stdout.flush()
    if piece:
        _open = not piece.endswith("\n")


@contextmanager
def apart() -> Iterator[None]:
    """Let what stderr says meanwhile begin on a line of its own, whoever says it."""
    stderr = sys.stderr
    talk: Any = _Talk(stderr)
    sys.stderr = talk
    try:
        yield
    except Exception:
        end_line()  # a traceback is shown when all is over
        raise
    finally:
        sys.stderr = stderr


class _Talk:
    """A stream like the one it stands for, which ends the text's line first."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, words: str) -> Any:
        if words:
            end_line()
        return self._stream.write(words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def end_line(*, interrupted: bool = False) -> None:
    """End the text's last line where stderr may go on in it; the text stays as it is.

    On a terminal the line is ended there. Anywhere else stdout holds the text and nothing more: the
    line is ended on stderr, where that may come right after the text.

    Parameters
    ----------
    interrupted
        Whether Ctrl-C was pressed, which a terminal shows behind whatever there is.
    """
    global _open
    was_open, _open = _open, False
    if sys.stdout.isatty():
        if was_open or interrupted:
            print(flush=True)
    elif (interrupted and sys.stderr.isatty()) or (was_open and _meet()):
        print(file=sys.stderr)


def _meet() -> bool:
    """Whether stdout and stderr may end up in one place.

    They do in one file, and where stderr is a terminal to which the reader of a pipe may write.
    """
    try:
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # one of them is no file but an object within Python
        return False
    piped = stat.S_ISFIFO(out.st_mode) or stat.S_ISSOCK(out.st_mode)
    return os.path.samestat(out, err) or (piped and sys.stderr.isatty())
