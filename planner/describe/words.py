"""Writes sizes in words."""

from __future__ import annotations

import math


def in_words(size: int) -> str:
    """Return a size for messages: fine enough that what is short shows."""
    if size >= 2**31:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def enough_in_words(size: int) -> str:
    """Return a size as :func:`in_words` does, rounded up: who gives that much gives enough."""
    step = 2**30 / 100 if size >= 2**31 else (2**20 if size >= 2**20 else 2**10) / 10
    return in_words(math.ceil(math.ceil(size / step) * step))
