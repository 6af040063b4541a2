"""Rotary embeddings of GGUF files as transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UnsupportedModelError
from hybrid.gguf.header import GgufHeader

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
#: What Llama 3 and its descendants stretch frequencies by; the files have the result alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTHS = (8192, 4096, 16384, 32768, 131072)


def rope_parameters(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Return what a model's positions turn by.

    Raises
    ------
    UnsupportedModelError
        When its frequencies are scaled in a way that transformers does not have.
    """
    base = float(header.get("rope.freq_base", 10000.0))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    turned = int(header.get("rope.dimension_count", head_dim))
    if turned < head_dim:
        found["partial_rotary_factor"] = turned / head_dim
    kind = str(header.get("rope.scaling.type", "none"))
    small = header.tensors.keys() & {_LONG, _FREQUENCIES}
    if small and not header.path.is_file():
        return found  # of a file that lies elsewhere: a plan does not ask what positions turn by
    if _LONG in small:
        return found | _longrope(header)
    if _FREQUENCIES in small:
        return found | _llama3(header.read_floats(_FREQUENCIES), base, turned)
    factor = float(header.get("rope.scaling.factor", 1.0))
    if kind in ("none", "longrope") or factor <= 1.0:
        return found
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return found | _yarn(header, factor)
    raise UnsupportedModelError(
        f"{header.path} scales its rotary embedding in a way called {kind!r}",
        hint="read are: linear, yarn, longrope and Llama 3's",
    )


def _yarn(header: GgufHeader, factor: float) -> dict[str, Any]:
    names = {
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
        "rope.scaling.yarn_attn_factor": "attention_factor",
    }
    given = {ours: header.get(key) for key, ours in names.items() if header.get(key) is not None}
    return {"rope_type": "yarn", "factor": factor, **given}


def _longrope(header: GgufHeader) -> dict[str, Any]:
    attention = header.get("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "long_factor": header.read_floats(_LONG).tolist(),
        "short_factor": header.read_floats(_SHORT).tolist(),
        "original_max_position_embeddings": int(header.get("rope.scaling.original_context_length")),
        **({} if attention is None else {"attention_factor": float(attention)}),
    }


def _llama3(divisors: NDArray[np.float32], base: float, turned: int) -> dict[str, Any]:
    """Find the parameters whose frequencies are those that a file has."""
    factor = float(divisors.max())
    for length in _LLAMA3_LENGTHS:
        found = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
        found["original_max_position_embeddings"] = length
        if np.allclose(_stretched(base, turned, factor, length), divisors, rtol=1e-4):
            return found
    raise UnsupportedModelError(
        f"frequencies of the rotary embedding are divided by up to {factor:g} in a way that is "
        "not Llama 3's",
        hint="use the publisher's safetensors files",
    )


def _stretched(base: float, turned: int, factor: float, length: int) -> NDArray[np.float64]:
    """Return what Llama 3 divides its frequencies by, ``[pairs]``."""
    waves = 2 * math.pi * base ** (np.arange(0, turned, 2) / turned)
    low, high = (length / _LLAMA3[name] for name in ("low_freq_factor", "high_freq_factor"))
    smooth = (length / waves - _LLAMA3["low_freq_factor"]) / (
        _LLAMA3["high_freq_factor"] - _LLAMA3["low_freq_factor"]
    )
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < high, 1.0, np.where(waves > low, factor, between))
