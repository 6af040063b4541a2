"""A step of several tokens against the naive twin of one, token by token in float64."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import decoder_layers
import naive_dense
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.layers import Layer
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
VOCAB = 50


@pytest.fixture(autouse=True)
def the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tests ran before."""
    monkeypatch.setattr(decoder_layers, "_rng", np.random.default_rng(1))


def _decoder(*layers: Layer, paired: bool = False) -> Decoder:
    head = make_matrix(VOCAB, D, layers[0].q.format)
    return Decoder(layers, norm=make_norm(D), lm_head=head, scale=0.5, paired=paired)


def _fill(cache: Any, layers: tuple[Layer, ...], texts: int, past: int) -> None:
    for index, layer in enumerate(layers):
        count, dim, key = layer.stored
        sides = (draw(texts * count, past, dim), draw(texts * count, past, dim))
        cache.store(index, *(sides[0],) * 2 if key else sides)


def _of_text(side: Any, text: int, texts: int, first: int = 0) -> Any:
    """One text's part of a cache's keys or values, from a position on, in float64."""
    heads = side.shape[0] // texts
    return side[text * heads : (text + 1) * heads, first:].astype(np.float64)


def _check(
    layer: Layer,
    tokens: int = 3,
    past: int = 5,
    paired: bool = False,
    padding: tuple[int, ...] = (0,),
    kept: tuple[int, ...] | None = None,
) -> None:
    """Two steps of some texts through two such layers and a head, beside single tokens of each."""
    layers, texts = (layer, layer), len(padding)
    decoder, count = _decoder(*layers, paired=paired), len(padding) * tokens
    cache = decoder.new_cache()
    _fill(cache, layers, texts, past)
    picked = np.arange(count, dtype=np.int32) if kept is None else np.array(kept, np.int32)
    # A rounding to int8 may fall to the other side, which some norms make more of.
    tolerance = 2e-4 if layer.q.format in ("f32", "bf16") else 1e-1
    for step in range(2):
        begins = np.array(padding, np.int64) - past - step * tokens
        x, angles = draw(count, D, scale=1.0), draw(count, PAIRS, scale=2.0)
        cos, sin = np.cos(angles), np.sin(angles)
        before = [cache.read(index) for index in range(2)]
        logits = np.full((len(picked), VOCAB), np.nan, np.float32)
        decoder.step_tokens(x, cos, sin, cache, logits, kept=picked, texts=texts, begins=begins)
        after = [cache.read(index) for index in range(2)]
        wanted = []
        for text, first in enumerate(padding):
            pasts: list[Any] = [
                tuple(_of_text(side, text, texts, first) for side in sides) for sides in before
            ]
            for token in range(tokens):
                n = text * tokens + token
                y = x[n].astype(np.float64)
                for index in range(2):
                    at = before[index][0].shape[1] + token
                    mine = tuple(_of_text(side, text, texts)[:, at] for side in after[index])
                    added, pasts[index] = naive_dense.attention(
                        layer, y, cos[n].astype(np.float64), sin[n].astype(np.float64), paired,
                        pasts[index], mine, tolerance,
                    )  # fmt: skip
                    y = y + added
                    y = y + naive_dense.feed_forward(layer, y)
                last = naive_dense.norm(decoder._norm, y)
                wanted.append(0.5 * naive_dense.multiply(decoder._lm_head, last))
        expected = np.array(wanted)[picked]
        np.testing.assert_allclose(logits, expected, atol=tolerance * np.abs(expected).max())
    assert cache.length(0) == past + 2 * tokens


@pytest.mark.parametrize("fmt", ["f32", "bf16", "q8_0", "q4_0"])
def test_a_step_equals_its_twin(fmt: str) -> None:
    """Norms, projections, attention, router and experts of several tokens, in every format."""
    _check(make_layer(fmt))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_layer_equals_its_twin(name: str) -> None:
    """Every optional part by itself."""
    _check(make_layer(**VARIANTS[name]))


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    """Every way of choosing and weighing experts, a token at a time."""
    _check(make_layer(router=ROUTERS[name]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 32, 50])
def test_any_number_of_tokens(tokens: int) -> None:
    """One, some, and more than meet a strip at a time."""
    if UNCOMPILED and tokens > 7:
        pytest.skip("minutes in plain Python")
    mlp = make_experts(1, "q8_0", 56)  # of many tokens some have two experts of nearly one score
    _check(make_layer("q8_0", router=None, experts=None, shared=mlp), tokens)


@pytest.mark.parametrize("past", [0, 15, 16, 255, 700, 1100])
@pytest.mark.parametrize("window", [0, 300])
def test_any_length_of_the_past(past: int, window: int) -> None:
    """Nothing cached, whole and broken strips, several chunks, a window that starts inside one."""
    if UNCOMPILED and past > 16:
        pytest.skip("minutes in plain Python")
    _check(make_layer(window=window), past=past)


def test_more_heads_than_an_item_has_rows() -> None:
    """Runs of a single token, and as many of them as there are tokens."""
    _check(make_layer(heads=80, kv_heads=1), tokens=2)


@pytest.mark.parametrize("padding", [(0, 0), (3, 0, 5), (16, 7)])
@pytest.mark.parametrize("window", [0, 6])
def test_several_texts(padding: tuple[int, ...], window: int) -> None:
    """Every text sees itself alone, from where it begins."""
    _check(make_layer(window=window), tokens=2, past=18, padding=padding)


def test_a_text_that_begins_in_the_step() -> None:
    """What lies in front of it has numbers, which nobody sees."""
    decoder = _decoder(make_layer())
    x, angles = draw(5, D, scale=1.0), draw(5, PAIRS)
    found = []
    for padded in (0, 2):
        cache, count = decoder.new_cache(), 3 + padded
        _fill(cache, decoder.layers, 1, 0)
        logits, kept = np.zeros((3, VOCAB), np.float32), np.arange(padded, count, dtype=np.int32)
        rows = [np.ascontiguousarray(side[5 - count :]) for side in (x, angles, angles)]
        begins = np.array([padded], np.int64)
        decoder.step_tokens(*rows, cache, logits, kept=kept, begins=begins)
        found.append(logits)
        assert np.isfinite(cache.read(0)[0]).all()
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_only_the_logits_that_are_asked_for() -> None:
    """In their order."""
    _check(make_layer(), tokens=4, kept=(3, 1))


def test_paired_rotation() -> None:
    """Rotary embeddings that turn neighbours."""
    _check(make_layer(), paired=True)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_compressed_cache(apart: bool, low_rank: bool) -> None:
    """Absorbed products of several tokens, and of several texts."""
    _check(make_latent_layer(apart=apart, low_rank=low_rank))
    _check(make_latent_layer(low_rank=low_rank), paired=True, padding=(0, 2))


@pytest.mark.parametrize("fmt", ["bf16", "q8_0", "q4_0"])
def test_a_compressed_cache_in_every_format(fmt: str) -> None:
    """Quantized products, and the part that stays float32."""
    _check(make_latent_layer(fmt, low_rank=True))


def test_a_long_compressed_past() -> None:
    """Several chunks of one key that two groups of heads see."""
    if UNCOMPILED:
        pytest.skip("minutes in plain Python")
    _check(make_latent_layer(), past=1100)


def test_layers_of_different_kinds() -> None:
    """An MLP behind a layer whose shared expert is weighed token by token gets its own weight."""
    weighed = make_layer(**VARIANTS["weighed shared expert"])
    dense = make_layer(**VARIANTS["no router"], residual=0.4)
    decoder = _decoder(weighed, dense)
    x, angles = draw(4, D), draw(4, PAIRS)
    alone = decoder.layer_tokens(1, x, angles, angles, _filled(decoder))
    cache = _filled(decoder)
    logits = np.zeros((4, VOCAB), np.float32)
    decoder.step_tokens(x, angles, angles, cache, logits, kept=np.arange(4, dtype=np.int32))
    between = decoder.layer_tokens(0, x, angles, angles, _filled(decoder))
    last = decoder.layer_tokens(1, between, angles, angles, _filled(decoder))
    head = np.zeros_like(logits)
    decoder.head_tokens(last, head)
    np.testing.assert_allclose(logits, head, atol=1e-5)
    single = decoder.layer_step(1, x[0].copy(), angles[0], angles[0], _filled(decoder))
    np.testing.assert_allclose(alone[0], single, atol=1e-5)


def _filled(decoder: Decoder) -> Any:
    cache = decoder.new_cache()
    _fill(cache, decoder.layers, 1, 0)
    return cache


def test_the_result_does_not_depend_on_threads() -> None:
    """One thread and all threads give the same bits."""
    decoder = _decoder(make_layer("q4_0"), make_layer("q4_0", window=200))
    past, x, angles = draw(2, 1300, DIM), draw(6, D), np.ones((6, PAIRS), np.float32)
    found = []
    most = int(numba.config.NUMBA_NUM_THREADS)
    for threads in (1, most):
        numba.set_num_threads(threads)
        cache = decoder.new_cache()
        for index in range(2):
            cache.store(index, past, past)
        logits = np.zeros((6, VOCAB), np.float32)
        decoder.step_tokens(x, angles, angles, cache, logits, kept=np.arange(6, dtype=np.int32))
        found.append(logits)
    numba.set_num_threads(most)
    np.testing.assert_array_equal(*found)


def test_what_is_no_number_stays_in_its_text() -> None:
    """NaN in one text: the others' logits are the same bits as without."""
    decoder = _decoder(*2 * [make_layer(shared=VARIANTS["shared expert"]["shared"])])
    x, angles, found = draw(6, D), np.ones((6, PAIRS), np.float32), []
    for spoilt in (False, True):
        cache = decoder.new_cache()
        _fill_alike(cache, decoder.layers, texts=3)
        given = x.copy()
        given[2] = np.nan if spoilt else given[2]
        logits = np.zeros((6, VOCAB), np.float32)
        kept = np.arange(6, dtype=np.int32)
        for _ in range(2):
            decoder.step_tokens(given, angles, angles, cache, logits, kept=kept, texts=3)
        found.append(logits)
    assert np.isnan(found[1][2:4]).all()
    np.testing.assert_array_equal(np.delete(found[1], (2, 3), 0), np.delete(found[0], (2, 3), 0))


def _fill_alike(cache: Any, layers: tuple[Layer, ...], texts: int) -> None:
    side = np.full((texts * 2, 4, DIM), 0.1, np.float32)
    for index in range(len(layers)):
        cache.store(index, side, side)


def test_wrong_shapes_are_refused() -> None:
    """What the kernels would read beyond its end raises, with both values, and adds nothing."""
    decoder = _decoder(make_layer())
    cache = _filled(decoder)
    x, angles, kept = draw(4, D), np.ones((4, PAIRS), np.float32), np.arange(4, dtype=np.int32)
    logits = np.zeros((4, VOCAB), np.float32)

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ShapeError, match=match):
            decoder.step_tokens(*args, **{"kept": kept} | options)

    refused(r"x is float32 \[4, 71\]", draw(4, 71), angles, angles, cache, logits)
    refused(r"cos is float32 \[3, 6\]", x, angles[:3], angles, cache, logits)
    refused(r"logits is float32 \[3, 50\].* \[4, 50\]", x, angles, angles, cache, logits[:3])
    refused("4 tokens of 3 texts", x, angles, angles, cache, logits, texts=3)
    refused(r"has \[2\] heads, 2 texts have \[4\]", x, angles, angles, cache, logits, texts=2)
    refused("tokens of 4 are int32", x, angles, angles, cache, logits, kept=kept + 1)
    with pytest.raises(ShapeError, match=r"has \[0\] heads"):
        decoder.step_tokens(x, angles, angles, decoder.new_cache(), logits, kept=kept)
    assert cache.length(0) == 0
