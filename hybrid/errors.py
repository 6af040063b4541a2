"""Errors a user can act on: what is wrong, both values, and the remedy as ``hint``."""

from __future__ import annotations

from typing import TypeVar

from hybrid.formats.errors import HybridError

_Error = TypeVar("_Error", bound=BaseException)


class UsageError(HybridError):
    """An option or argument has a value that cannot be used."""


class CheckpointError(HybridError):
    """A Hugging Face checkpoint directory cannot be read or is not what it claims."""


class StoreError(HybridError):
    """A packed expert store is missing, damaged, too new or belongs to another model."""


class UnsupportedModelError(HybridError):
    """The model's experts compute something the kernels do not."""


class DiskSpaceError(HybridError):
    """The destination has less room than what is about to be written."""


def bare(error: _Error) -> _Error:
    """Return an error without the frames it passed through, which keep their variables alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def first_line(error: BaseException) -> str:
    """Return an error's message up to the first line break, or its name when it has none.

    A first line that announces another is told with it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return " ".join(told) or type(error).__name__
