"""What runs slower or holds less than it could."""

from __future__ import annotations

from typing import NamedTuple


class Note(NamedTuple):
    """Something that runs slower or holds less than it could: what, why, and what helps."""

    what: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.remedy}"

    @property
    def cause(self) -> tuple[str, str]:
        """What and why, whatever number of steps it has befallen so far."""
        return self.what.lstrip("0123456789"), self.reason
