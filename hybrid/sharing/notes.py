"""Keeps what did not go as planned, for the report, and says it at once."""

from __future__ import annotations

import sys

from hybrid.formats.notes import Note


class Notes(list[Note]):
    """Notes in the order in which they were made."""

    def say(self, note: Note | None) -> None:
        """Keep a note and say it on stderr; None is nothing to say."""
        if note is not None:
            self.append(note)
            print(f"hybrid: {note.what}: {note.reason}", file=sys.stderr)
