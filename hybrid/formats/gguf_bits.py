"""How GGUF's blocks hold bits: what the readers of several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.strips import GROUP, U8


def half(raw: U8, at: int) -> NDArray[Any]:
    """The half precision number at byte ``at`` of every block ``[N, B, bytes]``."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view("<f2")[..., 0]


def fields(raw: U8, run: int, bits: int) -> U8:
    """Codes of ``bits`` bits, ``run`` bytes at a time: first all lowest fields, then the next.

    ``[..., bytes]`` becomes ``[..., bytes * 8 / bits]``.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = raw.reshape(*raw.shape[:-1], -1, 1, run)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*raw.shape[:-1], -1)


def in_order(raw: U8, bits: int) -> U8:
    """Codes of ``bits`` bits, those of a byte side by side, the lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(*raw.shape[:-1], -1)


def nibbles(raw: U8) -> U8:
    """The codes of a block of 32: low nibbles, then high ones."""
    return fields(raw, GROUP // 2, 4)[:, :, None]
