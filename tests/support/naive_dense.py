"""Plain twins of the one-token kernels: one decoder layer in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import naive
from cpu_experts.decoder import records
from cpu_experts.decoder.layers import Layer, Router
from cpu_experts.decoder.matrices import Matrix, Norm
from cpu_experts.kernels.records import Experts
from hybrid.formats.activations import round_activations
from hybrid.formats.block import unpack_expert
from hybrid.formats.matrix import unpack
from hybrid.formats.registry import is_quantized

F64 = NDArray[np.float64]


def norm(value: Norm, x: F64) -> F64:
    """Root mean square norm, or with the mean taken off."""
    centered = x - x.mean() if value.centered else x
    y = centered / np.sqrt((centered**2).mean() + value.eps) * value.weight
    return y if value.bias is None else y + value.bias


def multiply(matrix: Matrix, x: F64) -> F64:
    """A packed matrix times a vector that is rounded as the format's kernels round it."""
    seen = x.astype(np.float32)
    if is_quantized(matrix.format):
        seen = round_activations(seen[None])[0]
    w = unpack(matrix.weight, matrix.rows, matrix.cols, matrix.format).astype(np.float64)
    y = w @ seen.astype(np.float64)
    return y if matrix.bias is None else y + matrix.bias


def rotate(x: F64, cos: F64, sin: F64, paired: bool) -> F64:
    """Turn pairs of one head: neighbours, or first half and second half."""
    y = x.copy()
    for i in range(len(cos)):
        a, b = (2 * i, 2 * i + 1) if paired else (i, i + len(cos))
        y[a] = x[a] * cos[i] - x[b] * sin[i]
        y[b] = x[b] * cos[i] + x[a] * sin[i]
    return y


def heads(value: Norm | None, x: F64, dim: int, clip: float) -> F64:
    """Cut a projection into heads ``[H, dim]``, normed head by head or all together."""
    if value is not None and len(value.weight) == len(x):
        x = norm(value, x)
    cut = x.reshape(-1, dim)
    if value is not None and len(value.weight) == dim and len(x) != dim:
        cut = np.stack([norm(value, head) for head in cut])
    return np.clip(cut, -clip, clip)


def softmax(x: F64) -> F64:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def attention(
    layer: Layer,
    x: F64,
    cos: F64,
    sin: F64,
    paired: bool,
    past: tuple[F64, F64],
    kept: tuple[F64, F64],
    tolerance: float,
) -> tuple[F64, tuple[F64, F64]]:
    """What attention adds to ``x``, and keys and values ``[H, T + 1, dim]`` with the new token.

    ``kept`` are the token's key and value as the cache has them, ``[H, dim]``: half precision,
    checked here and then used, because what lies between two halves may be rounded to either.
    """
    seen, dim = norm(layer.norm, x), layer.head_dim
    if layer.latent is not None:
        return latent_attention(layer, seen, cos, sin, paired, past, kept, tolerance)
    assert layer.v is not None
    queries, gates = multiply(layer.q, seen), np.ones(layer.heads * dim)
    if layer.gated:
        sides = queries.reshape(layer.heads, 2, dim)
        queries, gates = sides[:, 0].reshape(-1), 1 / (1 + np.exp(-sides[:, 1].reshape(-1)))
    q = heads(layer.q_norm, queries, dim, layer.clip)
    k = heads(layer.k_norm, multiply(layer.k, seen), dim, layer.clip)
    v = heads(None, multiply(layer.v, seen), dim, layer.clip)
    q, k = (np.stack([rotate(head, cos, sin, paired) for head in side]) for side in (q, k))
    for side, found in zip((k, v), kept, strict=True):
        np.testing.assert_allclose(found, side, rtol=2**-11 + tolerance, atol=tolerance)
    keys = np.concatenate((past[0], kept[0][:, None]), axis=1)
    values = np.concatenate((past[1], kept[1][:, None]), axis=1)
    window = layer.window or keys.shape[1]
    out = []
    for head in range(layer.heads):
        group = head // (layer.heads // layer.kv_heads)
        scores = keys[group, -window:] @ q[head] * layer.scaling
        if layer.sinks is not None:
            scores = np.append(scores, layer.sinks[head])
        weights = softmax(scores)[: len(scores) - (layer.sinks is not None)]
        out.append(weights @ values[group, -window:])
    found = np.concatenate(out) * gates
    return layer.residual * multiply(layer.o, found), (keys, values)


def latent_attention(
    layer: Layer,
    seen: F64,
    cos: F64,
    sin: F64,
    paired: bool,
    past: tuple[F64, F64],
    kept: tuple[F64, F64],
    tolerance: float,
) -> tuple[F64, tuple[F64, F64]]:
    """Keys and values of all heads made anew from the compressed cache, as the paper has it."""
    latent = layer.latent
    assert latent is not None

    def turn(part: F64) -> F64:
        if not latent.apart:
            return rotate(part, cos, sin, paired)
        turned = rotate(part, cos, sin, True)
        return np.concatenate((turned[0::2], turned[1::2]))

    q = multiply(layer.q, seen)
    if latent.q_b is not None and latent.q_norm is not None:
        q = multiply(latent.q_b, norm(latent.q_norm, q))
    both = multiply(layer.k, seen)
    own = np.concatenate((turn(both[latent.rank :]), norm(latent.kv_norm, both[: latent.rank])))
    for found in kept:
        np.testing.assert_allclose(found[0], own, rtol=2**-11 + tolerance, atol=tolerance)
    cache = np.concatenate((past[0][0], kept[0]))
    matrix = latent.kv_b
    w = unpack(matrix.weight, matrix.rows, matrix.cols, matrix.format).astype(np.float64)
    out = []
    for head, query in enumerate(q.reshape(layer.heads, -1)):
        mine = w.reshape(layer.heads, -1, latent.rank)[head]
        keys = cache[:, latent.rope :] @ mine[: latent.nope].T
        scores = keys @ query[: latent.nope] + cache[:, : latent.rope] @ turn(query[latent.nope :])
        mixed = softmax(scores * layer.scaling) @ cache[:, latent.rope :]
        if is_quantized(matrix.format):
            mixed = round_activations(mixed.astype(np.float32)[None])[0].astype(np.float64)
        out.append(mine[latent.nope :] @ mixed)
    grown = tuple(
        np.concatenate((before, mine[:, None]), axis=1)
        for before, mine in zip(past, kept, strict=True)
    )
    return layer.residual * multiply(layer.o, np.concatenate(out)), (grown[0], grown[1])


def route(router: Router, logits: F64) -> dict[int, float]:
    """The chosen experts and their weights, by the families' formulas."""
    count = router.experts
    logits = logits[:count]
    if router.scoring == records.SPARSEMIXER:
        chosen: dict[int, float] = {}
        left = logits.copy()
        for _ in range(2):
            best = int(left.argmax())
            top = left[best]
            near = (top - logits) / np.maximum(np.abs(logits), top) <= 2 * router.jitter
            chosen[best] = float(1 / np.exp(left - top)[near & (left > -np.inf)].sum())
            left[best] = -np.inf
        return chosen
    scores = {
        records.SOFTMAX: softmax,
        records.SOFTMAX_OF_CHOSEN: lambda x: x,
        records.SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
    }[router.scoring](logits)
    choice = scores + (0 if router.correction is None else router.correction)
    if router.groups > 1:
        groups = choice.reshape(router.groups, -1)
        worth = np.sort(groups, axis=1)[:, -router.of_group :].sum(axis=1)
        for group in np.argsort(worth)[: router.groups - router.top_groups]:
            groups[group] = -np.inf
        choice = groups.reshape(-1)
    ids = np.argsort(-choice, kind="stable")[: router.top_k]
    weights = scores[ids]
    if router.scoring == records.SOFTMAX_OF_CHOSEN:
        weights = softmax(weights)
    if router.normalize:
        weights = weights / max(weights.sum(), router.floor)
    return dict(zip(ids.tolist(), (weights * router.scale).tolist(), strict=True))


def run(experts: Experts, expert: int, x: F64) -> F64:
    """One expert on a token."""
    block = experts.blocks[expert, : experts.shape.block_bytes]
    weights = unpack_expert(experts.shape, block)
    return naive.expert(experts.shape, weights, x.astype(np.float32))


def feed_forward(layer: Layer, x: F64) -> F64:
    """What experts and the shared expert add to ``x``."""
    seen, out, share = norm(layer.ffn_norm, x), np.zeros_like(x), 1.0
    if layer.router is not None and layer.experts is not None:
        logits = multiply(layer.router.matrix, seen)
        if layer.router.gated_shared:
            share = 1 / (1 + np.exp(-logits[-1]))
        for expert, weight in route(layer.router, logits).items():
            out += weight * run(layer.experts, expert, seen)
    if layer.shared is not None:
        out += share * run(layer.shared, 0, seen)
    return layer.residual * out
