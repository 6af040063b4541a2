"""What users ask of speculation: whether to draft tokens, from what, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from hybrid.errors import UsageError

MOST_DRAFTED = 15
"""Tokens of a draft at most."""
_CHOICES = f"choose auto, off, lookup, or how many tokens to draft, 1 to {MOST_DRAFTED}"


@dataclass(frozen=True)
class Speculate:
    """Which tokens are drafted, to be checked several at a time.

    Make one with :meth:`of`.

    Attributes
    ----------
    source
        ``"auto"`` is whatever there is, ``"lookup"`` is what followed in the text before, ``"off"``
        is nothing.
    count
        How many tokens to draft wherever there are some; None is as many as pay.
    """

    source: str = "auto"
    count: int | None = None

    @classmethod
    def of(cls, asked: Any, name: str = "speculate") -> Self:
        """Understand what a user wrote: a word, or a number; None is ``"auto"``.

        Raises
        ------
        UsageError
            When it is neither, or too large.
        """
        if asked is None:
            return cls()
        if isinstance(asked, str) and asked in ("auto", "off", "lookup"):
            return cls(asked)
        try:
            count = 0 if isinstance(asked, bool | float) else int(asked)
        except (TypeError, ValueError):
            count = 0
        if not 1 <= count <= MOST_DRAFTED:
            raise UsageError(f"{name} is {asked!r}", hint=_CHOICES)
        return cls("lookup", count)

    @property
    def off(self) -> bool:
        """Whether nothing is to be drafted."""
        return self.source == "off"

    def __str__(self) -> str:
        return self.source if self.count is None else f"{self.source} of {self.count}"
