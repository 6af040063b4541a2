"""How far two computations of the same may be apart where they are rounded to bfloat16."""

from __future__ import annotations

import math

from torch import Tensor


def last_place(values: Tensor) -> float:
    """Return a unit in the last place of the largest of ``values``, in bfloat16.

    bfloat16 has 8 bits of mantissa: between 2^e and 2^(e + 1) its numbers are 2^(e - 7) apart. Two
    sums that differ by next to nothing can be rounded to neighbours, 0.4 to 0.8 % apart.
    """
    _, exponent = math.frexp(float(values.abs().max()))
    return math.ldexp(1.0, exponent - 8)
