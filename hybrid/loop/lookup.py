"""Drafts from the text so far: what followed the last place that reads as its end does."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 8
"""Tokens in common from which places count as equally alike."""
_GRAMS = (3, 2)
"""Tokens by whose last occurrence a place is found, the longer ones first."""


class Lookup:
    """The text of one sequence, and the place in it that is followed at the moment.

    As long as new tokens are those of the place, the same place is followed; else the last place is
    looked for that has the text's last three tokens, or two, before it.

    Parameters
    ----------
    ids
        The text to begin with.

    Attributes
    ----------
    alike
        How many tokens before the place are those at the end of the text, ``LONGEST`` at most; 0
        where there is no place.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.alike = 0
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._place = 0
        for token in ids:
            self._append(token)
        self._find()

    @property
    def next(self) -> int | None:
        """The token that is expected; None where no place reads as the text's end."""
        return self._text[self._place] if self.alike else None

    def add(self, token: int) -> None:
        """Take the token that follows."""
        follows = token == self.next
        self._append(token)
        if follows:
            self._place += 1
            self.alike = min(self.alike + 1, LONGEST)
        else:
            self._find()

    def draft(self, count: int) -> list[int]:
        """Return the ``count`` tokens that are expected; what repeats itself goes on and on."""
        if not self.alike:
            return []
        found = self._text[self._place : self._place + count]
        period = len(self._text) - self._place
        for at in range(len(found), count):
            found.append(found[at - period])
        return found

    def _append(self, token: int) -> None:
        """Add a token, and note what follows the tokens before it: the token itself."""
        text = self._text
        here = len(text)
        for length in _GRAMS:
            if here >= length:
                self._places[tuple(text[here - length :])] = here
        text.append(token)

    def _find(self) -> None:
        """Look for the last place that reads as the text's end."""
        text = self._text
        end, self.alike = len(text), 0
        for length in _GRAMS:
            if end < length:
                continue
            place = self._places.get(tuple(text[end - length :]))
            if place is None:
                continue
            while length < min(LONGEST, place) and text[place - 1 - length] == text[-1 - length]:
                length += 1
            self._place, self.alike = place, length
            return
