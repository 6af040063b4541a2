"""Makes parts of the pieces of an answer: text, thoughts and calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hybrid.serve.call_formats import CallFormat, read_calls, types_of
from hybrid.serve.call_source import CallSource
from hybrid.serve.parts import Chance, Part, Text, Thought


class AnswerParts:
    """The parts of one answer.

    Parameters
    ----------
    form
        How calls are written; None where none are looked for.
    tools
        That may be called.
    """

    def __init__(self, form: CallFormat | None, tools: list[dict[str, Any]]) -> None:
        self._source = None if form is None else CallSource(form.new_id)
        self._reading = None
        if form is not None and self._source is not None:
            self._reading = read_calls(self._source, form, types_of(tools))

    def put(self, text: str, thought: bool, chances: tuple[Chance, ...]) -> list[Part]:
        """Take a piece, and return the parts that are certain by now."""
        if thought:
            return [Thought(text)]
        if self._source is None:
            return [Text(text, chances)]
        self._source.rest += text
        return self._read(chances)

    def finish(self, chances: tuple[Chance, ...] = ()) -> list[Part]:
        """Return what was held back, once no more pieces will come."""
        if self._source is None:
            return [Text("", chances)] if chances else []
        self._source.ended = True
        return self._read(chances)

    def _read(self, chances: tuple[Chance, ...]) -> list[Part]:
        assert self._source is not None
        if self._reading is not None and next(self._reading, self) is self:
            self._reading = None
        found = self._source.parts()
        for at, part in enumerate(found):
            if chances and isinstance(part, Text):
                found[at] = replace(part, chances=chances)
                return found
        return [*found, Text("", chances)] if chances else found
