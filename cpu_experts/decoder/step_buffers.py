"""What a step of several tokens is computed in: allocated once, for so many tokens and threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_experts.decoder import prompt
from cpu_experts.decoder.layers import Layer
from cpu_experts.decoder.step import ATTEND, Work
from cpu_experts.decoder.step_attention import ITEMS
from cpu_experts.kernels import experts as kernels
from hybrid.formats.activations import activation_bytes
from hybrid.formats.strips import F32, GROUP, TILE, pad


def padded(*shape: int) -> F32:
    """Zeros whose last dimension is whole cache lines, and one more between rows."""
    return np.zeros((*shape[:-1], pad(int(shape[-1]), TILE) + TILE), np.float32)


def scratch_of(layers: Sequence[Layer]) -> list[int]:
    """Return the float32 that gated delta nets need of a thread."""
    return [layer.delta.scratch for layer in layers if layer.delta is not None]


def _bytes(count: int, each: int) -> Any:
    """Room for ``count`` times ``each`` bytes, which also holds whole float32."""
    return np.zeros(pad(count * each, 64), np.uint8)


def allocate(
    layers: Sequence[Layer], hidden: int, tokens: int, threads: int, spent: NDArray[np.int64]
) -> Work:
    """Return buffers for steps of up to ``tokens`` tokens of all texts together.

    ``spent`` is the caller's, who reads it.
    """
    latents = [layer.latent for layer in layers if layer.latent is not None]
    narrow = [m.cols for latent in latents for m in (latent.absorb, latent.kv_b)]
    queries = [latent.q_b for latent in latents if latent.q_b is not None]
    of_heads = max(layer.heads * layer.head_dim for layer in layers)
    into_o = max(layer.o.cols for layer in layers)
    wide = pad(max(hidden, into_o, *(m.cols for m in queries)), GROUP)
    routed = [layer for layer in layers if layer.router is not None]
    routers = [layer.router for layer in layers if layer.router is not None]
    experts = max((router.experts for router in routers), default=0)
    chosen = max((router.top_k for router in routers), default=1)
    groups = max((router.groups for router in routers), default=1)
    h = max((layer.experts.h_stride for layer in routed if layer.experts), default=0)
    h_shared = max((layer.shared.h_stride for layer in layers if layer.shared), default=0)
    dim = max(layer.head_dim for layer in layers)
    rows = max(prompt.ROWS, *(layer.heads // layer.kv_heads for layer in layers))
    parts = int(ITEMS) * rows
    counters = int(ATTEND) + 2 + tokens * max(layer.kv_heads for layer in layers)
    own = pad(max(narrow, default=0), GROUP)
    return Work(
        x=np.zeros((tokens, hidden), np.float32),
        normed=padded(tokens, wide),
        acts=np.zeros((3, tokens, activation_bytes(wide) + 64), np.uint8),
        qkv=padded(tokens, max(sum(m.rows for m in layer.projections) for layer in layers)),
        queries=padded(tokens, max((m.rows for m in queries), default=0)),
        looking=np.zeros(tokens * of_heads, np.float32),
        attended=padded(tokens, max(wide, of_heads)),
        expanded=padded(tokens, wide if latents else 0),
        parts=padded(parts, dim),
        stats=np.zeros((parts, 2), np.float32),
        scores=padded(tokens, experts + 1),
        ids=np.zeros(tokens * chosen, np.int64),
        weights=np.zeros(tokens * chosen, np.float32),
        shares=np.zeros(tokens, np.float32),
        experts=np.zeros(experts + 1, np.int64),
        first=np.zeros(experts + 1, np.int64),
        pairs=np.zeros(tokens * chosen, np.int32),
        rows=np.zeros(tokens * chosen, np.int32),
        h=_bytes(tokens * chosen, h),
        h_shared=_bytes(tokens, h_shared),
        counters=np.zeros((len(layers) + 1, pad(counters, 8)), np.int64),
        spent=spent,
        order=np.arange(max(tokens * chosen, rows), dtype=np.int32),
        zeros=np.zeros(1, np.int64),
        everyone=np.zeros(2, np.int64),
        my_buf=padded(threads, max(kernels.SCRATCH, rows * TILE, *scratch_of(layers))),
        my_places=np.zeros((threads, rows + TILE), np.int32),
        my_scores=padded(threads, rows * prompt.SPAN),
        my_stats=np.zeros((threads, rows, TILE), np.float32),
        my_sums=padded(threads, rows, dim),
        my_key=padded(threads, dim),
        my_normed=padded(threads, tokens if latents else 0, own),
        my_act=np.zeros((threads, tokens if latents else 0, activation_bytes(own) + 64), np.uint8),
        my_ids=np.zeros((threads, pad(chosen, 8) + 8), np.int64),
        my_weights=padded(threads, max(chosen, groups)),
        my_choice=padded(threads, 2 * max(experts, 1)),
    )


class Rows(NamedTuple):
    """Buffers of :func:`cpu_experts.decoder.prompt.attend`, in the order of its arguments."""

    threads: int
    counter: NDArray[np.int64]
    rows: NDArray[np.int32]
    key: F32
    queries: F32
    scores: F32
    buf: F32
    stats: F32
    sums: F32

    @classmethod
    def allocate(cls, layers: Sequence[Layer], threads: int) -> Rows:
        dim = max(layer.head_dim for layer in layers)
        rows = max(prompt.ROWS, *(layer.heads // layer.kv_heads for layer in layers))
        return cls(
            threads=threads,
            counter=np.zeros(1, np.int64),
            rows=np.arange(rows, dtype=np.int32),
            key=padded(threads, dim),
            queries=padded(threads, rows * dim),
            scores=padded(threads, rows * prompt.SPAN),
            buf=padded(threads, rows * TILE),
            stats=np.zeros((threads, rows, TILE), np.float32),
            sums=padded(threads, rows, dim),
        )
