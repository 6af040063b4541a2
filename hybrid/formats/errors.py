"""The base of every error that hybrid and its engines raise on purpose."""

from __future__ import annotations


class HybridError(Exception):
    """Something a user can act on.

    Parameters
    ----------
    message
        What is wrong, naming the thing and both values.
    hint
        What to do about it; the command line prints it on its own line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class FormatError(HybridError):
    """A weight format is unknown, or a packed buffer does not fit its shape."""


class ShapeError(HybridError):
    """Arrays or a packed block have another size, type or memory layout than they must have."""
