"""How many bytes weights take."""

from __future__ import annotations

import math

from planner.errors import CostError

BITS_PER_WEIGHT = {"q4_0": 4.5, "q8_0": 8.5, "bf16": 16.0, "f32": 32.0}
"""Groups of 32 weights share a 16-bit scale in the quantized formats."""


def weight_bytes(params: float, fmt: str) -> int:
    """Bytes of ``params`` weights in ``fmt``.

    Raises
    ------
    CostError
        When the format is unknown.
    """
    if fmt not in BITS_PER_WEIGHT:
        raise CostError(
            f"unknown weight format {fmt!r}", hint=f"use one of {', '.join(BITS_PER_WEIGHT)}"
        )
    return math.ceil(params * BITS_PER_WEIGHT[fmt] / 8)
