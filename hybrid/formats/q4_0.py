"""q4_0: 4-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

A unit is 288 bytes: four 64-byte chunks, then the 16 rows' scales. Byte ``4 r + b`` of chunk ``j``
holds input ``4 j + b`` of row ``r`` in its low nibble and input ``16 + 4 j + b`` in its high
nibble. The value is d (q - 8).
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.groups import F16, grouped, groups_of, half_scales, inverse
from hybrid.formats.strips import F32, GROUP, I8, U8

NAME = "q4_0"


def quantize(w: F32) -> tuple[I8, F16]:
    """Return codes 0..15 ``[N, K]`` and scales ``[N, K / 32]`` of ``w``.

    Notes
    -----
    The rules of ggml's reference quantizer, in the same float32 operations: the value of largest
    magnitude, sign included, divided by -8.
    """
    groups = groups_of(w)
    at = np.argmax(np.abs(groups), axis=-1)[..., None]
    d = np.take_along_axis(groups, at, axis=-1)[..., 0] / np.float32(-8)
    codes = np.clip(groups * inverse(d)[..., None] + np.float32(8.5), 0, 15)
    return codes.astype(np.int8).reshape(w.shape), half_scales(d, groups, NAME)


def _store(codes: U8) -> U8:
    return np.bitwise_or(codes[:, :, :4], np.left_shift(codes[:, :, 4:], 4, dtype=np.uint8))


def _load(chunks: U8) -> I8:
    codes: I8 = np.concatenate((chunks & 15, chunks >> 4), axis=2).view(np.int8) - np.int8(8)
    return codes


FORMAT = grouped(NAME, 0, code_bytes=GROUP // 2, quantize=quantize, store=_store, load=_load)
