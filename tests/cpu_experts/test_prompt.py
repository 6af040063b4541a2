"""Attention of many tokens at once against its naive twin, in float64."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import naive_dense
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.kv import KeyValues
from cpu_experts.decoder.layers import Layer
from cpu_experts.decoder.matrices import Matrix, Norm
from cpu_experts.kernels.records import Experts
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import pack

UNCOMPILED = bool(numba.config.DISABLE_JIT)
D, DIM, PAIRS = 32, 24, 8
rng = np.random.default_rng(0)


def _draw(*size: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(size) * scale).astype(np.float32)


def _norm(size: int) -> Norm:
    return Norm(weight=1 + _draw(size, scale=0.3), eps=1e-5)


def _matrix(rows: int, cols: int) -> Matrix:
    return Matrix(weight=pack(_draw(rows, cols), "f32"), rows=rows, cols=cols, format="f32")


def _decoder(heads: int = 4, kv_heads: int = 2, paired: bool = False, **changes: Any) -> Decoder:
    shape = Block(hidden=D, intermediate=16, format="f32")
    block = pack_expert(shape, gate=_draw(16, D), up=_draw(16, D), down=_draw(D, 16))
    values: dict[str, Any] = {
        "norm": _norm(D),
        "ffn_norm": _norm(D),
        "q": _matrix(heads * DIM, D),
        "k": _matrix(kv_heads * DIM, D),
        "v": _matrix(kv_heads * DIM, D),
        "o": _matrix(D, heads * DIM),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": DIM,
        "scaling": 0.3,
        "shared": Experts(blocks=block[None], shape=shape),
    }
    layer = Layer(**values | changes)
    return Decoder([layer], norm=_norm(D), lm_head=_matrix(16, D), paired=paired)


def _sides(layer: Layer, tokens: int) -> list[np.ndarray]:
    return [_draw(tokens, matrix.rows) for matrix in layer.projections]


def _cache(decoder: Decoder, past: int) -> KeyValues:
    cache, heads = decoder.new_cache(), decoder.layers[0].kv_heads
    cache.store(0, _draw(heads, past, DIM), _draw(heads, past, DIM))
    return cache


def _check(decoder: Decoder, tokens: int, past: int, paired: bool = False) -> None:
    layer, cache = decoder.layers[0], _cache(decoder, past)
    q, k, v = _sides(layer, tokens)
    angles = _draw(tokens, PAIRS, scale=2.0)
    cos, sin = np.cos(angles), np.sin(angles)
    out = decoder.attend(0, q, k, v, cos, sin, cache)
    assert cache.length(0) == past + tokens
    keys, values = (side.astype(np.float64) for side in cache.read(0))
    for t in range(tokens):
        turned = []
        for norm, side in ((layer.q_norm, q), (layer.k_norm, k)):
            cut = naive_dense.heads(norm, side[t].astype(np.float64), DIM, layer.clip)
            turned.append(np.stack([naive_dense.rotate(h, cos[t], sin[t], paired) for h in cut]))
        added = naive_dense.heads(None, v[t].astype(np.float64), DIM, layer.clip)
        np.testing.assert_allclose(keys[:, past + t], turned[1], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(values[:, past + t], added, rtol=1e-3, atol=1e-6)
        first = max(0, past + t + 1 - layer.window) if layer.window else 0
        for head, query in enumerate(turned[0]):
            group = head // (layer.heads // layer.kv_heads)
            seen = slice(first, past + t + 1)
            scores = keys[group, seen] @ query * layer.scaling
            if layer.sinks is not None:
                scores = np.append(scores, layer.sinks[head])
            weights = naive_dense.softmax(scores)[: past + t + 1 - first]
            found = out[t].reshape(-1, DIM)[head]
            np.testing.assert_allclose(found, weights @ values[group, seen], atol=2e-5)


@pytest.mark.parametrize("past", [0, 5, 16, 250, 600])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_equals_its_twin_at_any_length(tokens: int, past: int) -> None:
    """Single and many tokens, more than an item takes, spans and strips whole and broken."""
    if UNCOMPILED and tokens * past > 40:
        pytest.skip("minutes in plain Python")
    _check(_decoder(), tokens, past)


VARIANTS: dict[str, dict[str, Any]] = {
    "norm of every head": {"q_norm": _norm(DIM), "k_norm": _norm(DIM)},
    "norm over all heads": {"q_norm": _norm(4 * DIM), "k_norm": _norm(2 * DIM)},
    "sinks": {"sinks": _draw(4, scale=2.0)},
    "clip": {"clip": 0.5},
    "short window": {"window": 4},
    "long window": {"window": 290},
    "one head": {"heads": 1, "kv_heads": 1},
    "more heads than an item has rows": {"heads": 80, "kv_heads": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_its_twin(name: str) -> None:
    """Every optional part by itself, across more than one span of positions."""
    if UNCOMPILED:
        pytest.skip("minutes in plain Python")
    _check(_decoder(**VARIANTS[name]), 21, 520)


def test_paired_rotation() -> None:
    """Rotary embeddings that turn neighbours."""
    _check(_decoder(paired=True), 3, 2, paired=True)


def test_in_pieces_as_in_one() -> None:
    """Tokens in two calls see what they see in one."""
    decoder = _decoder()
    sides, angles = _sides(decoder.layers[0], 9), _draw(9, PAIRS)
    sides += [np.cos(angles), np.sin(angles)]
    one, two = decoder.new_cache(), decoder.new_cache()
    for cache in (one, two):
        cache.store(0, *2 * [np.zeros((2, 0, DIM), np.float32)])
    whole = decoder.attend(0, *sides, one)
    parts = [
        decoder.attend(0, *(side[cut] for side in sides), two) for cut in (slice(4), slice(4, 9))
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_the_result_does_not_depend_on_threads() -> None:
    """One thread and all threads give the same bits."""
    decoder, found = _decoder(), []
    past, sides = _draw(2, 40, DIM), _sides(decoder.layers[0], 30)
    angles = np.ones((30, PAIRS), np.float32)
    most = int(numba.config.NUMBA_NUM_THREADS)
    for threads in (1, most):
        numba.set_num_threads(threads)
        cache = decoder.new_cache()
        cache.store(0, past, past)
        found.append(decoder.attend(0, *sides, angles, angles, cache))
    numba.set_num_threads(most)
    np.testing.assert_array_equal(*found)


def test_wrong_shapes_are_refused() -> None:
    """What the kernels would read beyond its end raises, with both values."""
    decoder = _decoder()
    cache, (q, k, v), angles = _cache(decoder, 3), _sides(decoder.layers[0], 2), np.ones((2, PAIRS))
    good = angles.astype(np.float32)
    with pytest.raises(ShapeError, match=r"k is float32 \[2, 24\].* \[2, 48\]"):
        decoder.attend(0, q, k[:, :DIM].copy(), v, good, good, cache)
    with pytest.raises(ShapeError, match=r"sin is float64"):
        decoder.attend(0, q, k, v, good, angles, cache)
    with pytest.raises(ShapeError, match="layer 0 has no keys"):
        decoder.attend(0, q, k, v, good, good, decoder.new_cache())
