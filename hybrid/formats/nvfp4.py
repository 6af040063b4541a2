"""nvfp4: 4-bit floats under 8-bit floats of 16 inputs, NVIDIA's format, which GGUF has too.

The value is g s / 2 times what the code stands for (:data:`hybrid.formats.tables.FP4`): s of the
half group is a float of four exponent bits and three of mantissa without a sign. NVIDIA's
checkpoints have a float32 g of a whole matrix beside it, so a unit of 256 inputs has one for each
row; in GGUF's blocks it is 1.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.elements import NVFP4, Elements, Held, all_of, shared
from hybrid.formats.gguf_bits import fields
from hybrid.formats.groups import GROUPS, Fields, grouped, inverse
from hybrid.formats.search import weighted
from hybrid.formats.strips import F32, GROUP, SUPER, TILE, U8, Layout, pad
from hybrid.formats.tables import FLOATS8, FP4, fp4_codes

_LAYOUT = Layout((4,), groups=GROUPS, subs=2, scales=(np.dtype("<f4"),))
_HALF = GROUP // 2
#: The largest sub-scale, and the byte that stands for it; what is above it is no number.
_LARGEST, _LAST = np.float32(448), 126


def _fields(codes: U8, scales: U8, factor: float) -> Fields:
    """Fields of whole strips and units, filled up with zeros."""
    rows, cols = pad(codes.shape[0], TILE), pad(codes.shape[1], SUPER)
    both = []
    for part, width in ((codes, cols), (scales, cols // _HALF)):
        padded = np.zeros((rows, width), np.uint8)
        padded[: part.shape[0], : part.shape[1]] = part
        both.append(padded.reshape(rows, cols // SUPER, GROUPS, -1))
    factors = np.full((rows, cols // SUPER), factor, np.float32)
    return Fields(both[0], both[1], (factors,))


def _quantize(w: F32, columns: F32 | None = None) -> Fields:
    """Sub-scales that take a half group's largest value to 6 or to 4, whichever leaves less."""
    halves = w.reshape(*w.shape[:3], 2, _HALF)
    largest = np.abs(halves).max(axis=-1)
    factor = largest.max(axis=(-1, -2)) / (6 * _LARGEST)
    towards = inverse(factor)[..., None, None]
    best = None
    for top in (6, 4):
        wanted = np.minimum(largest * towards / np.float32(top), _LARGEST)
        subs = np.minimum(np.searchsorted(_MIDDLES, wanted), _LAST).astype(np.uint8)
        d = _halved(subs, factor)[..., None]
        codes = fp4_codes(halves * inverse(d))
        error = weighted(np.square(d * FP4.astype(np.float32)[codes] - halves), columns)
        if best is None:
            best = codes, subs, error
        else:
            better = error < best[2]
            best = (
                np.where(better[..., None], codes, best[0]),
                np.where(better, subs, best[1]),
                error,
            )
    assert best is not None
    return Fields(best[0].reshape(w.shape), best[1], (factor,))


#: Between two neighbouring floats of 8 bits.
_MIDDLES = (FLOATS8[1:] + FLOATS8[:-1]) * np.float32(0.5)


def _halved(subs: U8, factor: F32) -> F32:
    """``g s / 2`` ``[N, U, G, 2]``."""
    found: F32 = factor[..., None, None] * (FLOATS8[subs] * np.float32(0.5))
    return found


def _values(of: Fields) -> F32:
    halves = of.codes.reshape(*of.codes.shape[:3], 2, _HALF)
    values: F32 = _halved(of.subs, of.scales[0])[..., None] * FP4.astype(np.float32)[halves]
    return values.reshape(of.codes.shape)


def _blocks(raw: U8) -> Fields:
    """Blocks of 64: four sub-scales, then 8 bytes of each 16 codes, low nibbles first."""
    rows = len(raw)
    codes = fields(raw[..., 4:].reshape(rows, -1, 8), 8, 4).reshape(rows, -1)
    subs = np.where(raw[..., :4] == _LAST + 1, 0, raw[..., :4] & 127).reshape(rows, -1)
    return _fields(codes, subs, 1.0)


def _hold(of: Elements) -> Held | None:
    factors = shared(of["scale"].reshape(*of.shape[:2], -1)) if all_of(of, NVFP4) else None
    subs = shared(of["sub"].reshape(*of.shape[:3], 2, _HALF))
    if factors is None or subs is None or (subs > _LAST).any():
        return None
    return Held(Fields(of["number"].astype(np.uint8), subs, (factors,)), True)


FORMAT = grouped(
    "nvfp4",
    _LAYOUT,
    quantize=_quantize,
    values=_values,
    blocks=_blocks,
    block_bytes=36,
    block_inputs=64,
    hold=_hold,
)
