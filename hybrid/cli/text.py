"""The text on stdout, and what stderr says after it, on a line of its own."""

from __future__ import annotations

import os
import stat
import sys

_open = False
"""Whether the text's last line has not ended."""


def write(piece: str) -> None:
    """Put ``piece`` on stdout at once."""
    global _open
    sys.stdout.write(piece)
    sys.stdout.flush()
    if piece:
        _open = not piece.endswith("\n")


def end_line(*, interrupted: bool = False) -> None:
    """Let what stderr says next begin on a line of its own; the text stays as it is.

    On a terminal its last line is ended there. Anywhere else stdout holds the text and nothing
    more: the line is ended on stderr, where that may come right after the text.

    Parameters
    ----------
    interrupted
        Whether Ctrl-C was pressed, which a terminal shows behind whatever there is.
    """
    global _open
    if sys.stdout.isatty():
        if _open or interrupted:
            print(flush=True)
    elif (interrupted and sys.stderr.isatty()) or (_open and _meet()):
        print(file=sys.stderr)
    _open = False


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
