"""Small random layers of a decoder, as the one-token kernels take them, one part at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_experts.decoder.layers import Layer, Matrix, Norm, Router
from cpu_experts.kernels.records import Experts
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.matrix import pack

#: The width of the stream, of a head, and how many experts there are.
D, DIM, EXPERTS = 72, 16, 8
#: Pairs of a head's numbers that rotary embeddings turn.
PAIRS = 6
_rng = np.random.default_rng(0)


def draw(*size: int, scale: float = 0.3) -> np.ndarray:
    return (_rng.standard_normal(size) * scale).astype(np.float32)


def make_matrix(rows: int, cols: int, fmt: str, bias: bool = False) -> Matrix:
    weight = pack(draw(rows, cols), fmt)
    return Matrix(
        weight=weight, rows=rows, cols=cols, format=fmt, bias=draw(rows) if bias else None
    )


def make_norm(size: int, **changes: Any) -> Norm:
    return Norm(weight=1 + draw(size), eps=1e-5, **changes)


def make_experts(count: int, fmt: str, intermediate: int = 40, down_format: str = "") -> Experts:
    shape = Block(hidden=D, intermediate=intermediate, format=fmt, down_format=down_format)
    blocks = np.stack(
        [
            pack_expert(
                shape,
                gate=draw(intermediate, D),
                up=draw(intermediate, D),
                down=draw(D, intermediate),
            )
            for _ in range(count)
        ]
    )
    return Experts(blocks=blocks, shape=shape)


def make_router(**changes: Any) -> Router:
    rows = EXPERTS + bool(changes.get("gated_shared"))
    return Router(matrix=make_matrix(rows, D, "f32"), experts=EXPERTS, **{"top_k": 2} | changes)


def make_layer(fmt: str = "f32", heads: int = 4, kv_heads: int = 2, **changes: Any) -> Layer:
    values: dict[str, Any] = {
        "norm": make_norm(D),
        "ffn_norm": make_norm(D),
        "q": make_matrix(heads * DIM, D, fmt),
        "k": make_matrix(kv_heads * DIM, D, fmt),
        "v": make_matrix(kv_heads * DIM, D, fmt),
        "o": make_matrix(D, heads * DIM, fmt),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": DIM,
        "scaling": 0.25,
        "router": make_router(),
        "experts": make_experts(EXPERTS, fmt),
    }
    return Layer(**values | changes)
