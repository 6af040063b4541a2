"""The one-token kernels against their naive twin, in float64 on the same packed weights."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest

import naive_dense
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.layers import Layer, Router
from decoder_layers import (
    DIM,
    PAIRS,
    ROUTERS,
    VARIANTS,
    D,
    draw,
    make_experts,
    make_latent_layer,
    make_layer,
    make_matrix,
    make_norm,
)
from hybrid.formats.errors import ShapeError

UNCOMPILED = bool(numba.config.DISABLE_JIT)


def _check(layer: Layer, past: int = 5, paired: bool = False, steps: int = 2) -> None:
    """Some tokens after ``past`` others through two such layers and an lm_head."""
    layers = [layer, layer]
    head, last = make_matrix(50, D, layer.q.format), make_norm(D)
    decoder = Decoder(layers, norm=last, lm_head=head, scale=0.5, paired=paired)
    cache = decoder.new_cache()
    # A rounding to int8 may fall to the other side where float32 differs from float64.
    tolerance = 2e-4 if layer.q.format in ("f32", "bf16") else 2e-2
    pasts: list[Any] = []
    for index in range(2):
        count, dim, key = layer.stored
        sides = (draw(count, past, dim), draw(count, past, dim))
        sides = (sides[0],) * 2 if key else sides
        cache.store(index, *sides)
        pasts.append(tuple(side.astype(np.float16).astype(np.float64) for side in sides))
    logits = np.full(50, np.nan, np.float32)
    for _ in range(steps):
        token, angles = draw(D, scale=1.0), draw(PAIRS, scale=2.0)
        cos, sin = np.cos(angles), np.sin(angles)
        decoder.step(token, cos, sin, cache, logits)
        x = token.astype(np.float64)
        for index in range(2):
            kept = tuple(side[:, -1].astype(np.float64) for side in cache.read(index))
            added, pasts[index] = naive_dense.attention(
                layer,
                x,
                cos.astype(np.float64),
                sin.astype(np.float64),
                paired,
                pasts[index],
                kept,
                tolerance,
            )
            x = x + added
            x = x + naive_dense.feed_forward(layer, x)
        wanted = 0.5 * naive_dense.multiply(head, naive_dense.norm(last, x))
        np.testing.assert_allclose(logits, wanted, atol=tolerance * np.abs(wanted).max())
    for index in range(2):
        for found, wanted in zip(cache.read(index), pasts[index], strict=True):
            np.testing.assert_array_equal(found, wanted[:, -found.shape[1] :])


@pytest.mark.parametrize("fmt", ["f32", "bf16", "q8_0", "q4_0"])
def test_a_layer_equals_its_twin(fmt: str) -> None:
    """Norms, projections, attention, router and experts, in every format."""
    _check(make_layer(fmt))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_layer_equals_its_twin(name: str) -> None:
    """Every optional part by itself."""
    _check(make_layer(**VARIANTS[name]))


def test_paired_rotation() -> None:
    """Rotary embeddings that turn neighbours."""
    _check(make_layer(), paired=True)


@pytest.mark.parametrize("past", [0, 15, 16, 255, 256, 700])
@pytest.mark.parametrize("window", [0, 300])
def test_any_length_of_the_past(past: int, window: int) -> None:
    """Nothing cached, whole and broken strips, several chunks, a window that starts inside one."""
    if UNCOMPILED and past > 16:
        pytest.skip("minutes in plain Python")
    _check(make_layer(window=window), past)


def test_a_sliding_cache_forgets_and_goes_on() -> None:
    """With its buffer full, a layer with a window keeps what the window sees."""
    if UNCOMPILED:
        pytest.skip("minutes in plain Python")
    _check(make_layer(window=5), past=1, steps=600)


def test_the_result_does_not_depend_on_threads() -> None:
    """One thread and all threads give the same bits."""
    layer, head, last = make_layer("q4_0"), make_matrix(50, D, "q4_0"), make_norm(D)
    token, angles = draw(D), np.ones(PAIRS, np.float32)
    past = draw(2, 300, DIM)
    found = []
    most = int(numba.config.NUMBA_NUM_THREADS)
    for threads in (1, most):
        numba.set_num_threads(threads)
        decoder = Decoder([layer], norm=last, lm_head=head)
        cache = decoder.new_cache()
        cache.store(0, past, past)
        logits = np.zeros(50, np.float32)
        decoder.step(token, angles, angles, cache, logits)
        found.append(logits)
    numba.set_num_threads(most)
    np.testing.assert_array_equal(*found)


def test_what_a_step_takes_is_told_by_layer_and_part() -> None:
    """Together not more than what passed; a part that a layer has not takes nothing."""
    routed, dense = (
        make_layer("q4_0"),
        make_layer("q4_0", router=None, experts=None, shared=make_experts(1, "q4_0")),
    )
    decoder = Decoder([routed, dense], norm=make_norm(D), lm_head=make_matrix(50, D, "q4_0"))
    cache, logits = decoder.new_cache(), np.zeros(50, np.float32)
    for index in range(2):
        cache.store(index, draw(2, 3, DIM), draw(2, 3, DIM))
    step = draw(D), np.ones(PAIRS, np.float32), np.ones(PAIRS, np.float32), cache, logits
    decoder.step(*step)  # compiles
    decoder.begin_run()
    begun_s = time.perf_counter()
    for _ in range(3):
        decoder.step(*step)
    spent_s = decoder.spent_s()
    passed_s = time.perf_counter() - begun_s
    assert spent_s is not None
    assert (spent_s > 0).tolist() == [
        [True, True, False],
        [True, False, True],
        [True, False, False],
    ]
    assert spent_s.sum() < 1.1 * passed_s
    decoder.begin_run()
    again_s = decoder.spent_s()
    assert again_s is None or not again_s.any()


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_compressed_cache(apart: bool, low_rank: bool) -> None:
    """Absorbed products give what keys and values made anew for every head give."""
    _check(make_latent_layer(apart=apart, low_rank=low_rank))
    _check(make_latent_layer(low_rank=low_rank), paired=True)


@pytest.mark.parametrize("fmt", ["bf16", "q8_0", "q4_0"])
def test_a_compressed_cache_in_every_format(fmt: str) -> None:
    """Quantized products, and the part that stays float32."""
    _check(make_latent_layer(fmt, low_rank=True))


@pytest.mark.parametrize("past", [0, 255, 700])
def test_any_length_of_a_compressed_past(past: int) -> None:
    """Several chunks of one key that two groups of heads see."""
    if UNCOMPILED and past > 16:
        pytest.skip("minutes in plain Python")
    _check(make_latent_layer(), past)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    """Every way of choosing and weighing experts."""
    _check(make_layer(router=ROUTERS[name]))


def test_a_cache_gives_back_what_it_was_given() -> None:
    """In half precision, whatever the layout; dropping takes from the end."""
    decoder = Decoder([make_layer()], norm=make_norm(D), lm_head=make_matrix(50, D, "f32"))
    cache = decoder.new_cache()
    keys, values = draw(2, 37, DIM), draw(2, 37, DIM)
    cache.store(0, keys, values)
    cache.drop(0, 3)
    for found, given in zip(cache.read(0), (keys, values), strict=True):
        np.testing.assert_array_equal(found, given[:, :34].astype(np.float16))


def test_wrong_shapes_are_refused() -> None:
    """What the kernels would read beyond its end raises, with both values."""
    layer = make_layer()
    with pytest.raises(ShapeError, match=r"projections have \[64, 32, 32\]"):
        replace(layer, heads=8)
    compressed = make_latent_layer()
    with pytest.raises(ShapeError, match="compressed attention has"):
        replace(compressed, heads=8)
    with pytest.raises(ShapeError, match="no values"):
        replace(compressed, v=compressed.k)
    with pytest.raises(ShapeError, match="multiples of 16"):
        replace(compressed.latent, nope=24)
    with pytest.raises(ShapeError, match="router and experts"):
        replace(layer, router=None)
    with pytest.raises(ShapeError, match="8 rows, the matrix has 50"):
        Router(matrix=make_matrix(50, D, "f32"), experts=8, top_k=2)
    with pytest.raises(ShapeError, match="in a decoder of 64"):
        Decoder([layer], norm=make_norm(64), lm_head=make_matrix(50, 64, "f32"))
    decoder = Decoder([layer], norm=make_norm(D), lm_head=make_matrix(50, D, "f32"))
    angles = np.ones(PAIRS, np.float32)
    with pytest.raises(ShapeError, match=r"x is float32 \[71\]"):
        decoder.step(draw(71), angles, angles, decoder.new_cache(), draw(50))
    with pytest.raises(ShapeError, match="layer 0 has no keys"):
        decoder.step(draw(D), angles, angles, decoder.new_cache(), draw(50))
