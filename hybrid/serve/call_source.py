"""A text that arrives in pieces, for readers of calls that are written as generators.

A reader takes what is there and yields where it needs more; what it finds it tells to its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from hybrid.serve.parts import Arguments, CallBegun, Part, Text
from hybrid.textstream import overlap

R = TypeVar("R")
Reading = Generator[None, None, R]
"""What needs more text each time that it yields."""

_SCALAR_END = re.compile(r"[\s,}\]<\[]")


class CallSource:
    """The text that has come and was not read yet, and the parts that were made of it.

    Parameters
    ----------
    new_id
        Makes the id of a call.

    Attributes
    ----------
    rest
        What was not read yet.
    ended
        Whether nothing more will come.
    calls
        Calls that were found.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.rest, self.ended, self.calls = "", False, 0
        self._new_id = new_id
        self._parts: list[Part] = []

    def parts(self) -> list[Part]:
        """Return the parts that were found since the last time."""
        found, self._parts = self._parts, []
        return found

    def tell(self, text: str) -> None:
        """Take a text for the answer's own."""
        if text:
            self._parts.append(Text(text))

    def begin(self, name: str) -> None:
        """Take a call to have begun."""
        self._parts.append(CallBegun(self.calls, self._new_id(), name))
        self.calls += 1

    def argue(self, text: str) -> None:
        """Take a piece of the arguments of the call that has begun last."""
        if text:
            self._parts.append(Arguments(self.calls - 1, text))

    def space(self) -> Reading[None]:
        """Read white space away."""
        while True:
            self.rest = self.rest.lstrip()
            if self.rest or self.ended:
                return
            yield

    def begins(self, text: str) -> Reading[bool]:
        """Whether the text goes on with ``text``, which is read then."""
        while len(self.rest) < len(text) and text.startswith(self.rest) and not self.ended:
            yield
        if not self.rest.startswith(text):
            return False
        self.rest = self.rest[len(text) :]
        return True

    def until(
        self, marks: Sequence[str], tell: Callable[[str], None] | None = None
    ) -> Reading[tuple[str, str]]:
        """Read up to the first of ``marks``, and it; return what was before it, and which it is.

        Without one, everything up to the end and an empty mark. ``tell`` is given what was before
        it as it comes, and nothing of it is returned then.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.rest.find(mark)) >= 0]
            if found:
                at, mark = min(found, key=lambda each: (each[0], -len(each[1])))
                before, self.rest = self.rest[:at], self.rest[at + len(mark) :]
                break
            if self.ended:
                before, mark, self.rest = self.rest, "", ""
                break
            if tell is not None:
                held = max(overlap(self.rest, each) for each in marks)
                certain = self.rest[: len(self.rest) - held]
                self.rest = self.rest[len(certain) :]
                tell(certain)
            yield
        if tell is None:
            return before, mark
        tell(before)
        return "", mark

    def value(self, tell: Callable[[str], None]) -> Reading[bool]:
        """Read a value of JSON and tell its text as it comes; returns whether it is complete."""
        yield from self.space()
        if not self.rest:
            return False
        if self.rest[0] not in '{["':
            return (yield from self._scalar(tell))
        depth, quoted, escaped = 0, False, False
        while True:
            for at, letter in enumerate(self.rest):
                if quoted:
                    if escaped:
                        escaped = False
                    elif letter == "\\":
                        escaped = True
                    elif letter == '"':
                        quoted = False
                elif letter == '"':
                    quoted = True
                elif letter in "{[":
                    depth += 1
                elif letter in "}]":
                    depth -= 1
                if not depth and not quoted:
                    tell(self.rest[: at + 1])
                    self.rest = self.rest[at + 1 :]
                    return True
            tell(self.rest)
            self.rest = ""
            if self.ended:
                return False
            yield

    def collected(self) -> Reading[Any]:
        """Read a value of JSON and return it; None where it is none."""
        pieces: list[str] = []
        yield from self.value(pieces.append)
        try:
            return json.loads("".join(pieces))
        except (ValueError, RecursionError):
            return None

    def _scalar(self, tell: Callable[[str], None]) -> Reading[bool]:
        while True:
            end = _SCALAR_END.search(self.rest)
            if end is not None:
                tell(self.rest[: end.start()])
                self.rest = self.rest[end.start() :]
                return True
            if self.ended:
                tell(self.rest)
                self.rest = ""
                return True
            yield
