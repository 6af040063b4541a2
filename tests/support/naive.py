"""Plain twins of the compiled code: slow, obvious, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.activations import round_activations
from hybrid.formats.block import Block, ExpertWeights
from hybrid.formats.registry import is_quantized


def quantize_q4_0(row: Iterable[float]) -> tuple[list[int], np.float16]:
    """Codes 0..15 and scale of one group of 32: the extreme value maps to code 0."""
    values = [np.float32(v) for v in row]
    extreme = values[0]
    for v in values:
        if abs(v) > abs(extreme):
            extreme = v
    d = extreme / np.float32(-8)
    inverse = np.float32(1) / d if d else np.float32(0)
    codes = [min(15, max(0, int(v * inverse + np.float32(8.5)))) for v in values]
    return codes, np.float16(d)


def quantize_q8_0(row: Iterable[float]) -> tuple[list[int], np.float16]:
    """Codes -127..127 and scale of one group of 32, halves away from zero."""
    values = [np.float32(v) for v in row]
    d = max(abs(v) for v in values) / np.float32(127)
    inverse = np.float32(1) / d if d else np.float32(0)
    codes = []
    for v in values:
        scaled = v * inverse
        codes.append(int(math.copysign(math.floor(abs(scaled) + np.float32(0.5)), scaled)))
    return codes, np.float16(d)


def activation(kind: str, alpha: float, v: float) -> float:
    """The activation functions by their textbook formulas."""
    if kind == "silu":
        return v / (1 + math.exp(-alpha * v)) if v > -700 else 0.0
    if kind == "gelu":
        return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if kind == "relu":
        return max(v, 0.0)
    if kind == "relu2":
        return max(v, 0.0) ** 2
    if kind == "sigmoid":
        return 1 / (1 + math.exp(-v))
    assert kind == "none"
    return v


def expert(shape: Block, weights: ExpertWeights, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """One expert on one token ``[D]``, with the roundings that the format's kernels make."""
    seen = round_activations(x[None])[0] if is_quantized(shape.format) else x

    def project(w: NDArray[np.float32], b: NDArray[np.float32] | None, v: NDArray) -> NDArray:
        y = w.astype(np.float64) @ v.astype(np.float64)
        return y if b is None else y + b

    up = np.clip(project(weights.up, weights.up_bias, seen), -shape.limit, shape.limit)
    if weights.gate is None:
        h = np.array([activation(shape.activation, shape.alpha, v) for v in up])
    else:
        gate = np.minimum(project(weights.gate, weights.gate_bias, seen), shape.limit)
        h = np.array([activation(shape.activation, shape.alpha, v) for v in gate])
        h = h * (up + shape.up_offset)
    if is_quantized(shape.formats[1]):
        h = round_activations(h.astype(np.float32)[None])[0]
    return project(weights.down, weights.down_bias, h)


def experts(
    shape: Block,
    weights: list[ExpertWeights],
    x: NDArray[np.float32],
    ids: NDArray[np.int64],
    routing_weights: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Every routed pair by itself, in the order of the router's choice."""
    out = np.zeros(x.shape, np.float64)
    for token in range(x.shape[0]):
        for choice in range(ids.shape[1]):
            if 0 <= ids[token, choice] < len(weights):
                y = expert(shape, weights[ids[token, choice]], x[token])
                out[token] += float(routing_weights[token, choice]) * y
    return out
