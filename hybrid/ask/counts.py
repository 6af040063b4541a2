"""Whole numbers that users give."""

from __future__ import annotations

import operator
from typing import Any

from hybrid.errors import UsageError


def whole_number(
    value: Any, name: str, *, least: int = 1, most: int | None = None, hint: str = ""
) -> int:
    """Return ``value`` as an int.

    Raises
    ------
    UsageError
        When it is no whole number from ``least`` to ``most``; with ``hint``, or how to leave it
        out.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise UsageError(
            f"{name} is {value!r}, it must be a whole number {bounds}",
            hint=hint or f"give another number, or leave {name} out",
        )
    return number
