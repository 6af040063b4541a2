"""Small random layers of a decoder, as the one-token kernels take them, one part at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_experts.decoder import records
from cpu_experts.decoder.layers import Latent, Layer, Router
from cpu_experts.decoder.matrices import Matrix, Norm
from cpu_experts.kernels.records import Experts
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.matrix import pack, unpack

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


def make_latent_layer(fmt: str = "f32", apart: bool = False, low_rank: bool = False) -> Layer:
    """Four heads in two groups: 16 numbers of a key that do not turn, 12 that do, values of 32."""
    heads, nope, rope, value, rank, narrow = 4, 16, 2 * PAIRS, 32, 48, 40
    kv_b = make_matrix(heads * (nope + value), rank, fmt)
    w = unpack(kv_b.weight, kv_b.rows, rank, fmt).reshape(heads, -1, rank)[:, :nope]
    absorbed = np.ascontiguousarray(w.swapaxes(1, 2)).reshape(-1, nope)
    queries = heads * (nope + rope)
    latent = Latent(
        rank=rank,
        rope=rope,
        nope=nope,
        value=value,
        kv_norm=make_norm(rank),
        absorb=Matrix(weight=pack(absorbed, "f32"), rows=heads * rank, cols=nope, format="f32"),
        kv_b=kv_b,
        q_norm=make_norm(narrow) if low_rank else None,
        q_b=make_matrix(queries, narrow, fmt) if low_rank else None,
        apart=apart,
    )
    return make_layer(
        fmt,
        heads=heads,
        kv_heads=2,
        head_dim=rank + rope,
        latent=latent,
        q=make_matrix(narrow if low_rank else queries, D, fmt),
        k=make_matrix(rank + rope, D, fmt),
        v=None,
        o=make_matrix(D, heads * value, fmt),
    )


#: Layers with one optional part each.
VARIANTS: dict[str, dict[str, Any]] = {
    "norm of every head": {"q_norm": make_norm(DIM), "k_norm": make_norm(DIM)},
    "norm over all heads": {"q_norm": make_norm(4 * DIM), "k_norm": make_norm(2 * DIM)},
    "gates": {
        "q": make_matrix(8 * DIM, D, "f32"),
        "gated": True,
        "q_norm": make_norm(DIM),
        "k_norm": make_norm(DIM),
    },
    "biases": {
        "q": make_matrix(4 * DIM, D, "f32", bias=True),
        "o": make_matrix(D, 4 * DIM, "f32", bias=True),
    },
    "layer norm": {"norm": make_norm(D, centered=True, bias=draw(D))},
    "sinks": {"sinks": draw(4, scale=2.0)},
    "window": {"window": 4},
    "window longer than the past": {"window": 40},
    "clip": {"clip": 0.5},
    "residual": {"residual": 0.3},
    "shared expert": {"shared": make_experts(1, "f32", 24)},
    "projections of several formats": {
        "k": make_matrix(2 * DIM, D, "q8_0"),
        "v": make_matrix(2 * DIM, D, "q4_k"),
    },
    "down in another format": {"experts": make_experts(8, "f32", down_format="q6_k")},
    "shared expert in another format": {"shared": make_experts(1, "q8_0", 24)},
    "weighed shared expert": {
        "shared": make_experts(1, "f32", 24),
        "router": make_router(gated_shared=True),
        "residual": 0.7,
    },
    "no router": {"router": None, "experts": None, "shared": make_experts(1, "f32", 56)},
    "one head": {"heads": 1, "kv_heads": 1},
    "six heads a key": {"heads": 6, "kv_heads": 1},
}

#: Every way of choosing and weighing experts.
ROUTERS = {
    "softmax": make_router(),
    "normalized": make_router(normalize=True, floor=1e-20, top_k=3),
    "floor": make_router(normalize=True, floor=0.9),
    "softmax of chosen": make_router(scoring=records.SOFTMAX_OF_CHOSEN),
    "sigmoid": make_router(scoring=records.SIGMOID, scale=2.5, correction=draw(EXPERTS)),
    "best of a group": make_router(groups=4, top_groups=2, of_group=1, scale=16.0),
    "groups": make_router(scoring=records.SIGMOID, groups=4, top_groups=2, top_k=3),
    "sparse mixer": make_router(scoring=records.SPARSEMIXER, jitter=0.1),
    "all experts": make_router(top_k=EXPERTS),
}
