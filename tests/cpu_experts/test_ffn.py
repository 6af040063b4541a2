"""The expert kernels against their naive twin, in float64 on the same quantized weights.

``test_levels.py`` runs this file again for every other SIMD level of this processor and
uncompiled.
"""

from __future__ import annotations

import threading

import numba
import numpy as np
import pytest

import naive
from cpu_experts import ffn
from cpu_experts.ffn import linear, project_down, project_up, run_experts
from hybrid.formats.activations import round_activations
from hybrid.formats.block import ACTIVATIONS, Block
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import pack, unpack
from hybrid.formats.registry import is_quantized
from random_experts import random_experts, random_routing

#: Every kind of layout, codes and scales; all formats are in ``test_strips.py``.
SOME = ("q4_0", "q8_0", "q4_k", "q6_k", "q2_k", "mxfp4", "bf16", "f32")
UNCOMPILED = bool(numba.config.DISABLE_JIT)
# Sums of up to a hundred float32 products of order one.
TOLERANCE = 2e-6


def _check(shape: Block, tokens: int, experts: int = 5, top_k: int = 2) -> None:
    blocks, weights = random_experts(shape, experts)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((tokens, shape.hidden)).astype(np.float32)
    ids, routing_weights = random_routing(tokens, experts, top_k)
    out = np.ones_like(x)
    run_experts(x, ids, routing_weights, blocks, shape, out)
    want = 1 + naive.experts(shape, weights, x, ids, routing_weights)
    _close(out, want)


def _close(out: np.ndarray, want: np.ndarray) -> None:
    """Equal to float32 rounding, but for the odd token whose int8 activations flipped a code.

    The compiled code rounds a float32 intermediate to int8, the twin a float64 one: a value
    that lies on the boundary between two codes can fall to either side.
    """
    error, size = np.abs(out - want), max(1, np.abs(want).max())
    flipped = (error > TOLERANCE * size).any(axis=1)
    assert flipped.sum() <= len(out) // 20, f"tokens off: {np.flatnonzero(flipped)}"
    assert error.max() <= 0.01 * size


@pytest.mark.parametrize("fmt", SOME)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_equals_naive_at_every_load(fmt: str, tokens: int) -> None:
    """One token, a few, and more than the widest micro-kernel takes at once."""
    if UNCOMPILED and tokens > 2:
        pytest.skip("uncompiled loops are checked on small loads")
    _check(Block(hidden=64, intermediate=96, format=fmt), tokens)


@pytest.mark.parametrize(
    ("up", "down"), [("q4_k", "q6_k"), ("q8_0", "f32"), ("bf16", "q5_1"), ("q6_k", "q8_0")]
)
def test_down_in_another_format(up: str, down: str) -> None:
    """Each side reads what its own format makes of its activations; by itself, too."""
    shape = Block(hidden=64, intermediate=96, format=up, down_format=down, bias=True)
    _check(shape, 3)
    blocks, weights = random_experts(shape, 1)
    h = np.random.default_rng(0).standard_normal((2, 96)).astype(np.float32)
    seen = round_activations(h) if is_quantized(down) else h
    found = project_down(h, np.zeros((2, 1), np.int64), blocks, shape)
    want = seen.astype(np.float64) @ weights[0].down.T + weights[0].down_bias
    np.testing.assert_allclose(found, want, atol=2e-5)


@pytest.mark.parametrize("fmt", SOME)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (33, 31), (100, 40)])
def test_ragged_sizes(fmt: str, hidden: int, intermediate: int) -> None:
    """Sizes that fill neither strips of 16 nor groups of 32, with biases."""
    if UNCOMPILED and hidden > 50:
        pytest.skip("uncompiled loops are checked on small sizes")
    _check(Block(hidden=hidden, intermediate=intermediate, format=fmt, bias=True), 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation: str, gated: bool) -> None:
    """Every activation, with and without a gate."""
    shape = Block(hidden=32, intermediate=48, format="f32", activation=activation, gated=gated)
    _check(shape, 2)


def test_clamped_swiglu_with_offset_and_biases() -> None:
    """gpt_oss's arithmetic: clamps below typical values, alpha, up + 1, biases everywhere."""
    shape = Block(
        hidden=64,
        intermediate=64,
        format="q8_0",
        limit=0.4,
        alpha=1.702,
        up_offset=1.0,
        bias=True,
    )
    _check(shape, 3)


def test_ids_outside_the_experts_contribute_nothing() -> None:
    """-1 and ids past the last expert are skipped; a call with no valid id changes nothing."""
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    blocks, weights = random_experts(shape, 3)
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    ids = np.array([[0, 3], [-1, 2]])
    ones = np.ones((2, 2), np.float32)
    out = np.zeros_like(x)
    run_experts(x, ids, ones, blocks, shape, out)
    np.testing.assert_allclose(out, naive.experts(shape, weights, x, ids, ones), atol=1e-5)
    before = out.copy()
    run_experts(x, np.full((2, 2), -1), ones, blocks, shape, out)
    np.testing.assert_array_equal(out, before)


def test_zero_tokens() -> None:
    """A batch without tokens is a call like any other."""
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    blocks, _ = random_experts(shape, 2)
    x = np.zeros((0, 32), np.float32)
    run_experts(x, np.zeros((0, 2), int), np.zeros((0, 2), np.float32), blocks, shape, x.copy())


@pytest.mark.skipif(UNCOMPILED, reason="hundreds of tokens need compiled loops")
@pytest.mark.parametrize("fmt", SOME)
def test_hundreds_of_tokens_and_thread_counts(fmt: str) -> None:
    """Uneven loads over many tokens; one thread and all threads give the same bits."""
    shape = Block(hidden=96, intermediate=64, format=fmt)
    blocks, weights = random_experts(shape, 6)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 96)).astype(np.float32)
    ids = np.minimum(rng.geometric(0.5, (300, 2)) - 1, 5)
    routing_weights = rng.random((300, 2)).astype(np.float32)
    outs = []
    all_threads = numba.get_num_threads()
    for threads in (1, all_threads):
        numba.set_num_threads(threads)
        try:
            outs.append(np.zeros_like(x))
            run_experts(x, ids, routing_weights, blocks, shape, outs[-1])
        finally:
            numba.set_num_threads(all_threads)
    np.testing.assert_array_equal(outs[0], outs[1])
    want = naive.experts(shape, weights, x[:20], ids[:20], routing_weights[:20])
    _close(outs[0][:20], want)


def test_batching_does_not_change_a_token() -> None:
    """A token's result is the same bits alone and among others."""
    shape = Block(hidden=64, intermediate=32, format="q4_0")
    blocks, _ = random_experts(shape, 4)
    tokens = 3 if UNCOMPILED else 23
    x = np.random.default_rng(0).standard_normal((tokens, 64)).astype(np.float32)
    ids, routing_weights = random_routing(tokens, 4, 1)
    together, alone = np.zeros_like(x), np.zeros_like(x)
    run_experts(x, ids, routing_weights, blocks, shape, together)
    for t in range(tokens):
        one = slice(t, t + 1)
        run_experts(x[one], ids[one], routing_weights[one], blocks, shape, alone[one])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("fmt", ["q4_0", "f32"])
def test_nan_and_infinity_are_not_hidden(fmt: str) -> None:
    """A token that is not finite gives no finite output; its neighbours are untouched."""
    shape = Block(hidden=32, intermediate=32, format=fmt)
    blocks, _ = random_experts(shape, 2)
    x = np.ones((3, 32), np.float32)
    x[0, 5], x[1, 7] = np.nan, np.inf
    out = np.zeros_like(x)
    run_experts(x, np.zeros((3, 1), int), np.ones((3, 1), np.float32), blocks, shape, out)
    assert not np.isfinite(out[0]).any()
    assert not np.isfinite(out[1]).all()
    assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("limit", [np.inf, 2.0])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_clamps_keep_nan(activation: str, limit: float, gated: bool) -> None:
    """As in torch: no activation and no clamp turns NaN into a number."""
    shape = Block(
        hidden=16, intermediate=16, format="f32", activation=activation, limit=limit, gated=gated
    )
    blocks, _ = random_experts(shape, 1)
    x, out = np.full((1, 16), np.nan, np.float32), np.zeros((1, 16), np.float32)
    run_experts(x, np.zeros((1, 1), int), np.ones((1, 1), np.float32), blocks, shape, out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
def test_the_level_is_chosen_once(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the environment after the kernels are made does not change what they compute."""
    shape = Block(hidden=32, intermediate=32, format=fmt)
    blocks, _ = random_experts(shape, 2)
    x, (ids, routing_weights) = np.ones((1, 32), np.float32), random_routing(1, 2, 2)
    outs = []
    for choice in ("", "portable", "avx2"):
        monkeypatch.setenv("HYBRID_SIMD", choice)
        outs.append(np.zeros_like(x))
        run_experts(x, ids, routing_weights, blocks, shape, outs[-1])
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize("fmt", SOME)
@pytest.mark.parametrize("gated", [True, False])
def test_projections_alone(fmt: str, gated: bool) -> None:
    """project_up and project_down give raw, biased products pair by pair."""
    shape = Block(hidden=40, intermediate=50, format=fmt, gated=gated, bias=True)
    blocks, weights = random_experts(shape, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 40)).astype(np.float32)
    ids = np.array([[0, 2], [1, -1], [2, 0], [1, 2]])
    gate, up = project_up(x, ids, blocks, shape)
    h = rng.standard_normal((8, 50)).astype(np.float32)
    down = project_down(h, ids, blocks, shape)
    seen, h_seen = (round_activations(v) if is_quantized(fmt) else v for v in (x, h))
    assert (gate is None) != gated
    for pair, expert in enumerate(ids.reshape(-1)):
        if expert < 0:
            assert not up[pair].any()
            assert not down[pair].any()
            continue
        w, token = weights[expert], seen[pair // 2].astype(np.float64)
        np.testing.assert_allclose(up[pair], w.up @ token + w.up_bias, atol=2e-5)
        if gate is not None:
            np.testing.assert_allclose(gate[pair], w.gate @ token + w.gate_bias, atol=2e-5)
        np.testing.assert_allclose(down[pair], w.down @ h_seen[pair] + w.down_bias, atol=2e-5)


@pytest.mark.parametrize("fmt", SOME)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_linear_equals_naive(fmt: str, tokens: int) -> None:
    """A dense layer is one expert that every token goes to, ragged sizes and bias included."""
    rng = np.random.default_rng(0)
    w, bias = (rng.standard_normal(size).astype(np.float32) for size in ((50, 70), (50,)))
    x = rng.standard_normal((tokens, 70)).astype(np.float32)
    out = np.full((tokens, 50), np.nan, np.float32)
    packed = pack(w, fmt)
    linear(x, packed, fmt, bias, out)
    seen = round_activations(x) if is_quantized(fmt) and tokens else x
    want = seen.astype(np.float64) @ unpack(packed, 50, 70, fmt).T + bias
    np.testing.assert_allclose(out, want, atol=3e-5)


@pytest.mark.skipif(UNCOMPILED, reason="nothing runs at once without compiled code")
def test_concurrent_calls_are_serialised() -> None:
    """Calls from several Python threads give each its own right result."""
    shape = Block(hidden=64, intermediate=64, format="q4_0")
    blocks, _ = random_experts(shape, 4)
    ids, routing_weights = random_routing(16, 4, 2)
    inputs = np.random.default_rng(0).standard_normal((4, 16, 64)).astype(np.float32)
    want, got = np.zeros_like(inputs), np.zeros_like(inputs)
    for x, out in zip(inputs, want, strict=True):
        run_experts(x, ids, routing_weights, blocks, shape, out)

    def work(i: int) -> None:
        for _ in range(20):
            got[i] = 0
            run_experts(inputs[i], ids, routing_weights, blocks, shape, got[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(got, want)


def test_what_is_known_of_blocks_goes_with_them() -> None:
    """New experts in the memory, or under the identity, of old ones are seen as what they are."""
    before = len(ffn._PREPARED)
    for width in (32, 64, 32, 96):
        shape = Block(hidden=width, intermediate=32, format="q4_0")
        blocks, weights = random_experts(shape, 3, seed=width)
        x, ids, ones = np.ones((1, width), np.float32), np.array([[2, 0]]), np.ones((1, 2))
        out = np.zeros_like(x)
        run_experts(x, ids, ones.astype(np.float32), blocks, shape, out)
        np.testing.assert_allclose(out, naive.experts(shape, weights, x, ids, ones), atol=1e-4)
        other = Block(hidden=width, intermediate=32, format="q4_0", activation="relu")
        out = np.zeros_like(x)
        run_experts(x, ids, ones.astype(np.float32), blocks, other, out)
        np.testing.assert_allclose(out, naive.experts(other, weights, x, ids, ones), atol=1e-4)
        assert len(ffn._PREPARED) == before + 1
        del blocks
    assert len(ffn._PREPARED) == before


def test_bad_arguments_are_named() -> None:
    """Wrong dtype, shape, layout and block size each give an error with both values."""
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    blocks, _ = random_experts(shape, 2)
    x, ids, ones = np.zeros((2, 32), np.float32), np.zeros((2, 1), int), np.ones((2, 1), np.float32)
    with pytest.raises(ShapeError, match="x is float64"):
        run_experts(x.astype(np.float64), ids, ones, blocks, shape, x)
    with pytest.raises(ShapeError, match=r"x is float32 .* not C-contiguous"):
        run_experts(np.zeros((32, 2), np.float32).T, ids, ones, blocks, shape, x)
    with pytest.raises(ShapeError, match=r"expert_ids are int64 \[3, 1\] for 2 tokens"):
        run_experts(x, np.zeros((3, 1), int), np.ones((3, 1), np.float32), blocks, shape, x.copy())
    with pytest.raises(ShapeError, match="routing_weights"):
        run_experts(x, ids, np.ones((2, 2), np.float32), blocks, shape, x.copy())
    with pytest.raises(ShapeError, match="blocks are"):
        run_experts(x, ids, ones, blocks[:, :64], shape, x.copy())
    with pytest.raises(ShapeError, match=r"takes uint8 \[576\]"):
        linear(x, np.zeros(288, np.uint8), "q4_0", None, np.zeros((2, 20), np.float32))
    with pytest.raises(ShapeError, match="expert_ids are float64"):
        run_experts(x, ids.astype(float), ones, blocks, shape, x.copy())


def test_a_bias_or_inputs_that_a_matrix_does_not_have() -> None:
    """A bias that would be broadcast, and a matrix without inputs, are errors."""
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 16), np.float32)
    packed = pack(np.zeros((16, 32), np.float32), "q4_0")
    with pytest.raises(ShapeError, match=r"bias is float32 \[1\]; it must be float32 \[16\]"):
        linear(x, packed, "q4_0", np.ones(1, np.float32), out)
    with pytest.raises(ShapeError, match="16 x 0 has no weights"):
        linear(x[:, :0].copy(), packed[:0], "q4_0", None, out)
