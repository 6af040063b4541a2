"""q8_0: 8-bit codes of 32 inputs and a float16 scale, the numbers of GGUF's format of this name.

A unit is 544 bytes: eight 64-byte chunks of int8, then the 16 rows' scales. Byte ``4 r + b`` of
chunk ``j`` holds input ``4 j + b`` of row ``r``. The value is d q.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.groups import F16, grouped, groups_of, half_scales, inverse
from hybrid.formats.strips import F32, GROUP, I8, U8

NAME = "q8_0"


def quantize(w: F32) -> tuple[I8, F16]:
    """Return codes -127..127 ``[N, K]`` and scales ``[N, K / 32]`` of ``w``.

    Notes
    -----
    The rules of ggml's reference quantizer, in the same float32 operations: the largest magnitude
    divided by 127, halves rounded away from zero.
    """
    groups = groups_of(w)
    d = np.max(np.abs(groups), axis=-1) / np.float32(127)
    scaled = groups * inverse(d)[..., None]
    whole = np.trunc(scaled)
    codes = whole + np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), 0)
    return codes.astype(np.int8).reshape(w.shape), half_scales(d, groups, NAME)


def _store(codes: U8) -> U8:
    return codes


def _load(chunks: U8) -> I8:
    return chunks.view(np.int8)


FORMAT = grouped(NAME, 1, code_bytes=GROUP, quantize=quantize, store=_store, load=_load)
