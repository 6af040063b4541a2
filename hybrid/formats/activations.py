"""Activations as the kernels of quantized formats see them: int8 in groups of 32.

A group of activations is ``ACT_GROUP`` bytes: 32 codes, a float32 scale, and two words for what a
kernel needs of the codes' sums. Rows have room for whole super-blocks.
"""

from __future__ import annotations

import numpy as np

from hybrid.formats.groups import TINY
from hybrid.formats.strips import F32, GROUP, I8, SUPER, pad

ACT_GROUP = GROUP + 12


def activation_bytes(cols: int) -> int:
    """Bytes of a row of ``cols`` quantized activations."""
    return pad(cols, SUPER) // GROUP * ACT_GROUP


def quantize_activations(x: F32) -> tuple[I8, F32]:
    """Quantize the kernels' int8 activations: groups of 32, scale = max|x| / 127.

    Parameters
    ----------
    x
        ``[T, K]`` float32.

    Returns
    -------
    codes int8 ``[T, Kp]`` and scales float32 ``[T, Kp / 32]``, Kp = K rounded up to 32; the
    kernels' numbers exactly (halves round to even).
    """
    padded = np.zeros((x.shape[0], pad(x.shape[1], GROUP)), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(x.shape[0], -1, GROUP)
    largest = np.max(np.abs(groups), axis=-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > TINY)
    codes = np.rint(groups * inverse[..., None]).astype(np.int8)
    return codes.reshape(padded.shape), largest / np.float32(127)


def round_activations(x: F32) -> F32:
    """What the int8 kernels see of ``x`` ``[T, K]``: quantized and widened again."""
    codes, scales = quantize_activations(x)
    groups = codes.reshape(*scales.shape, GROUP) * scales[..., None]
    return np.ascontiguousarray(groups.reshape(codes.shape)[:, : x.shape[1]])
