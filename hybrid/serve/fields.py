"""Reads a request's fields, each checked; what nobody read is refused in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrid.serve.refusals import Refusal, not_taken, wrong_value


class Fields:
    """The fields of a JSON object; null is as if a field was left out.

    Parameters
    ----------
    given
        The object.
    within
        What it is called in messages, with a dot behind it; empty for the request itself.
    """

    def __init__(self, given: object, within: str = "") -> None:
        if not isinstance(given, Mapping):
            raise wrong_value(within.rstrip(".") or "the body", given, "a JSON object")
        self._given = given
        self._within = within
        self._read: set[str] = set()

    def name(self, field: str) -> str:
        """Return what a field is called in messages."""
        return self._within + field

    def any(self, field: str) -> Any:
        """Return a field's value as it is; None without."""
        self._read.add(field)
        return self._given.get(field)

    def text(self, field: str) -> str | None:
        """Return a text."""
        value = self.any(field)
        if value is not None and not isinstance(value, str):
            raise wrong_value(self.name(field), value, "a string")
        return value

    def flag(self, field: str) -> bool:
        """Return whether a field is true."""
        value = self.any(field)
        if value is not None and not isinstance(value, bool):
            raise wrong_value(self.name(field), value, "true or false")
        return bool(value)

    def whole(self, field: str, least: int, most: int) -> int | None:
        """Return a whole number of a range."""
        value = self.any(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong_value(self.name(field), value, f"a whole number between {least} and {most}")
        return value

    def number(self, field: str, least: float, most: float) -> float | None:
        """Return a number of a range."""
        value = self.any(field)
        if value is None:
            return None
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not math.isfinite(_float(value)) or not least <= value <= most:
            raise wrong_value(self.name(field), value, f"a number between {least:g} and {most:g}")
        return float(value)

    def refuse(self, reasons: Mapping[str, tuple[str, tuple[Any, ...]]]) -> None:
        """Refuse fields that ask for what there is not: why, and the values that ask for nothing.

        Raises
        ------
        Refusal
            Naming the first.
        """
        for field, (why, nothing) in reasons.items():
            value = self.any(field)
            if value is not None and not any(_same(value, each) for each in nothing):
                raise not_taken(self.name(field), why)

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Refuse fields that nobody has read, but for the ``ignored``.

        Raises
        ------
        Refusal
            Naming the first.
        """
        for field in self._given:
            if field not in self._read and field not in ignored:
                raise Refusal(
                    f"{self.name(str(field)):.100}: there is no such field here; leave it out",
                    param=f"{self.name(str(field)):.100}",
                    code="unknown_parameter",
                )


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _same(value: object, other: object) -> bool:
    """Whether two values of JSON are the same one: true is not 1."""
    return type(value) is type(other) and value == other
