"""mxfp4: 4-bit floats of 32 inputs under a power of two, the numbers of OCP's and GGUF's format.

The value is 2^(e - 128) times what the code stands for, see :data:`hybrid.formats.tables.FP4`.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.elements import MXFP4, Elements, Held, all_of, shared
from hybrid.formats.gguf_bits import nibbles
from hybrid.formats.groups import Fields, grouped, inverse, no_subs
from hybrid.formats.search import weighted
from hybrid.formats.strips import F32, U8, Layout
from hybrid.formats.tables import FP4, fp4_codes, half_powers


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    """Of the two exponents that the largest value may have, the one that leaves less error."""
    largest = np.max(np.abs(w), axis=-1)
    with np.errstate(divide="ignore"):
        low = np.where(largest > 0, np.floor(np.log2(largest)) + 125, 0)
    best = None
    for e in (np.clip(low, 0, 254), np.clip(low + 1, 0, 254)):
        exponents = e.astype(np.uint8)
        d = half_powers(exponents)[..., None]
        codes = fp4_codes(w * inverse(d))
        error = weighted(np.square(d * FP4.astype(np.float32)[codes] - w), columns)
        if best is None:
            best = codes, exponents, error
        else:
            better = error < best[2]
            best = (
                np.where(better[..., None], codes, best[0]),
                np.where(better, exponents, best[1]),
                error,
            )
    assert best is not None
    return Fields(best[0], no_subs(best[0]), (best[1][..., 0],))


def _values(of: Fields) -> F32:
    values: F32 = half_powers(of.scales[0])[..., None, None] * FP4.astype(np.float32)[of.codes]
    return values


def _blocks(raw: U8) -> Fields:
    codes = nibbles(raw[..., 1:])
    return Fields(codes, no_subs(codes), (raw[..., 0],))


def _hold(of: Elements) -> Held | None:
    exponents = shared(of["sub"]) if all_of(of, MXFP4) else None
    if exponents is None or (exponents == 255).any():
        return None
    codes = of["number"].astype(np.uint8)
    return Held(Fields(codes, no_subs(codes), (exponents[..., 0],)), True)


FORMAT = grouped(
    "mxfp4",
    Layout((4,), scales=(np.dtype(np.uint8),)),
    quantize=_quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=17,
    hold=_hold,
)
