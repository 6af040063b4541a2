"""Random experts as packed blocks, and a random router's choice among them."""

from __future__ import annotations

import numpy as np

from hybrid.formats.block import Block, ExpertWeights, pack_expert, unpack_expert
from hybrid.formats.strips import pad


def random_experts(
    shape: Block, count: int, seed: int = 0
) -> tuple[np.ndarray, list[ExpertWeights]]:
    """Return ``count`` experts as one array of blocks, and their dequantized weights."""
    rng = np.random.default_rng(seed)

    def draw(*size: int) -> np.ndarray:
        return (rng.standard_normal(size) * 0.3).astype(np.float32)

    d, f = shape.hidden, shape.intermediate
    blocks = np.full((count, pad(shape.block_bytes, 256)), 0xFF, np.uint8)
    for block in blocks:
        pack_expert(
            shape,
            gate=draw(f, d) if shape.gated else None,
            up=draw(f, d),
            down=draw(d, f),
            gate_bias=draw(f) if shape.bias and shape.gated else None,
            up_bias=draw(f) if shape.bias else None,
            down_bias=draw(d) if shape.bias else None,
            out=block[: shape.block_bytes],
        )
    return blocks, [unpack_expert(shape, block[: shape.block_bytes]) for block in blocks]


def random_routing(
    tokens: int, experts: int, top_k: int, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and float32 weights ``[T, A]`` of ``top_k`` different experts for each token."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    return ids, rng.random((tokens, top_k)).astype(np.float32)
