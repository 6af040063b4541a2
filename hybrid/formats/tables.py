"""The 16 numbers that codes of four bits stand for, where they are not evenly spaced."""

from __future__ import annotations

import numpy as np

from hybrid.formats.search import nearest
from hybrid.formats.strips import F32, U8

#: Of iq4_nl and iq4_xs: closer together where weights are more frequent.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
#: Of mxfp4 and nvfp4: twice the floats of two exponent bits and one of mantissa, both zeros.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
#: Of nf4, in steps of 1 / 112 of the largest: 0.5 % off for normal weights (127 steps: 0.6 %).
NF4 = np.array([-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112], np.int8)
#: What the largest of :data:`NF4` stands for, in these steps.
NF4_STEPS = 112


def _floats8() -> F32:
    byte = np.arange(128, dtype=np.uint32)
    return (byte << 20).view(np.float32) * np.float32(2.0**120)


#: What bytes stand for as floats of four exponent bits and three of mantissa, without a sign.
FLOATS8 = _floats8()


def half_powers(e: U8) -> F32:
    """2^(e - 128); below what float32 has in full, a subnormal number."""
    bits = np.where(
        e < 2, np.uint32(0x200000) << e.astype(np.uint32), (e.astype(np.uint32) - 1) << 23
    )
    return bits.astype(np.uint32).view(np.float32)


def fp4_codes(x: F32) -> U8:
    """Codes of what is nearest to x in :data:`FP4`; of 0 the first."""
    codes = nearest(FP4[:8], np.abs(x))
    return codes | ((x < 0) & (codes > 0)).astype(np.uint8) << np.uint8(3)


def iq4_numbers(x: F32) -> F32:
    """What is nearest to x in :data:`IQ4`."""
    return IQ4.astype(np.float32)[nearest(IQ4, x)]
