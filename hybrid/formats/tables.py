"""The 16 numbers that codes of four bits stand for, where they are not evenly spaced."""

from __future__ import annotations

import numpy as np

from hybrid.formats.search import nearest
from hybrid.formats.strips import F32, U8

#: Of iq4_nl and iq4_xs: closer together where weights are more frequent.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
#: Of mxfp4 and nvfp4: twice the floats of two exponent bits and one of mantissa, both zeros.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def fp4_codes(x: F32) -> U8:
    """Codes of what is nearest to x in :data:`FP4`; of 0 the first."""
    codes = nearest(FP4[:8], np.abs(x))
    return codes | ((x < 0) & (codes > 0)).astype(np.uint8) << np.uint8(3)


def iq4_numbers(x: F32) -> F32:
    """What is nearest to x in :data:`IQ4`."""
    return IQ4.astype(np.float32)[nearest(IQ4, x)]
