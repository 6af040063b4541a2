"""Sizes of memory: what users write in bytes, and no more of it than there is."""

from __future__ import annotations

from math import isfinite, nan

from hybrid.errors import UsageError
from planner.describe.words import in_words

Size = str | int | None
"""Bytes, or a text such as ``"6GiB"``; None and ``"auto"`` are whatever there is."""

GIB = 2**30
UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "m": 2**20,
    "mib": 2**20,
    "g": 2**30,
    "gib": 2**30,
    "t": 2**40,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
"""A bare letter is binary, as in llama.cpp and docker; ``GB`` is decimal, ``GiB`` binary."""


def parse_bytes(text: str, option: str, *, zero: bool = False) -> int:
    """Return a size such as ``6GiB``, ``6G``, ``1.5e9`` in bytes; 0 only where ``zero`` allows it.

    Raises
    ------
    UsageError
        When it is not a number with a unit, not above 0, or more than there is anywhere.
    """
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmgt")
    try:
        value = float(number) * UNITS[compact[len(number) :]]
    except (KeyError, ValueError):
        value = nan
    if not isfinite(value):
        raise UsageError(
            f"{option} {text!r} is not a size", hint=f"for example {option} 6GiB or {option} 6000MB"
        )
    if value >= 2**60:
        raise UsageError(
            f"{option} {text!r} is {value / 2**40:.3g} TiB, more than any machine has",
            hint=f"for example {option} 6GiB; without a unit it is bytes",
        )
    if 0 < value < 1:
        raise UsageError(
            f"{option} {text!r} is less than one byte", hint=f"add a unit: {option} {number}GiB"
        )
    if value < 0 and zero:
        raise UsageError(f"{option} {text!r} is below 0", hint=f"{option} 0 is the CPU alone")
    if value <= 0 and not zero:
        raise UsageError(
            f"{option} {text!r} is not above 0",
            hint="for a machine without a GPU: --hardware cpu-only-laptop"
            if option == "--vram"
            else "give the memory the machine has",
        )
    return int(value)


def size_in_bytes(size: Size, option: str) -> int | None:
    """Return a size given as bytes or as a text such as ``"4GiB"``; None is whatever there is.

    Raises
    ------
    UsageError
        When it is no size; only vram can be 0.
    """
    if size is None or str(size).strip().lower() == "auto":
        return None
    return parse_bytes(str(size), option, zero=option.endswith("vram"))


def at_most(asked: int, total: int, what: str, owner: str) -> int:
    """Return a size that is asked for, or all there is where that is a little less.

    Memory is sold by the GiB, of which a card or a system keeps some to itself.

    Raises
    ------
    UsageError
        When it is more than that.
    """
    if asked > -(-total // GIB) * GIB:
        raise UsageError(
            f"{what} is {in_words(asked)}, {owner} has {in_words(total)}",
            hint=f"give it less, or leave {what} out to use what there is",
        )
    return min(asked, total)
