"""Gated delta nets of the kernels, beside their naive twin."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import naive_dense
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.delta_layer import Delta, Places
from cpu_experts.decoder.kv import KeyValues
from cpu_experts.decoder.layers import Layer
from cpu_experts.decoder.matrices import Norm
from decoder_layers import DIM, PAIRS, D, draw, make_layer, make_matrix, make_norm
from hybrid.formats.errors import ShapeError
from naive_delta import delta_net

KEYS, VALUES, KEY, VALUE, TAPS = 2, 6, 16, 32, 4
CHANNELS = 2 * KEYS * KEY + VALUES * VALUE


def _places(together: bool) -> Places:
    """By key head, or all heads' queries first."""
    shared = VALUES // KEYS
    values = shared * VALUE
    if together:
        step, behind = 2 * KEY + 2 * values, KEYS * (2 * KEY + 2 * values)
        steps = {f"{name}_step": step for name in "qkvz"}
        sides = {"q": 0, "k": KEY, "v": 2 * KEY, "z": 2 * KEY + values}
        return Places(**steps, **sides, b=behind, a=behind + shared, a_step=2 * shared)
    behind = CHANNELS + VALUES * VALUE
    steps = {"q_step": KEY, "k_step": KEY, "v_step": values, "z_step": values}
    sides = {"q": 0, "k": KEYS * KEY, "v": 2 * KEYS * KEY, "z": CHANNELS}
    return Places(**steps, **sides, b=behind, a=behind + VALUES, a_step=shared)


def _delta(together: bool = True, bias: bool = False, **changes: Any) -> Delta:
    values: dict[str, Any] = {
        "key_heads": KEYS,
        "value_heads": VALUES,
        "key_dim": KEY,
        "value_dim": VALUE,
        "places": _places(together),
        "conv": draw(TAPS, CHANNELS, scale=0.6),
        "bias": draw(CHANNELS) if bias else None,
        "forgets": -np.exp(draw(VALUES)),
        "steps": draw(VALUES),
        "norm": make_norm(VALUE),
    }
    return Delta(**values | changes)


def _layer(fmt: str, delta: Delta) -> Layer:
    products = (CHANNELS, VALUES * VALUE, 2 * VALUES)
    q, k, v = (make_matrix(rows, D, fmt) for rows in products)
    if delta.places.q_step != KEY:
        q, k, v = make_matrix(sum(products[:2]), D, fmt), v, None
    return make_layer(
        fmt,
        heads=VALUES,
        kv_heads=KEYS,
        head_dim=VALUE,
        q=q,
        k=k,
        v=v,
        o=make_matrix(D, VALUES * VALUE, fmt),
        delta=delta,
    )


def _decoder(layers: list[Layer]) -> Decoder:
    return Decoder(layers, norm=make_norm(D), lm_head=make_matrix(40, D, "f32"))


def _state(texts: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(texts, TAPS, CHANNELS), draw(texts, VALUES, KEY, VALUE)


def _after(layer: Layer, x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
    """What a layer makes of a text's tokens ``[T, D]``, and the state behind them, by its twin."""
    normed = [naive_dense.norm(layer.norm, row) for row in x]
    products = np.stack(
        [
            np.concatenate([naive_dense.multiply(m, row) for m in layer.projections])
            for row in normed
        ]
    )
    assert layer.delta is not None
    found, *after = delta_net(layer.delta, products, *state)
    made = []
    for row, one in zip(x, found, strict=True):
        mixed = row + naive_dense.multiply(layer.o, one)
        made.append(mixed + naive_dense.feed_forward(layer, mixed))
    return np.stack(made), tuple(after)


@pytest.mark.parametrize("together", [True, False], ids=["by key head", "one by one"])
@pytest.mark.parametrize("fmt", ["f32", "q8_0"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_tokens_move_the_state_as_its_twin_does(together: bool, fmt: str, bias: bool) -> None:
    """Single tokens and steps of several, one text and two, shorter and longer than the taps."""
    layer = _layer(fmt, _delta(together, bias))
    decoder = _decoder([layer])
    tolerance = 2e-4 if fmt == "f32" else 2e-2
    logits, none = np.empty(40, np.float32), np.zeros(0, np.int32)
    for texts in (1, 2):
        cache, kept = decoder.new_cache(), _state(texts)
        cache.store_memory(0, *kept)
        states: list[Any] = [
            tuple(side[text].astype(float) for side in kept) for text in range(texts)
        ]
        for tokens in (1, 2, 1, 5):
            x = draw(texts * tokens, D, scale=1.0)
            angles, ahead = np.zeros((len(x), 0), np.float32), copy.deepcopy(cache)
            wanted = []
            for text in range(texts):
                mine = x[text * tokens : (text + 1) * tokens].astype(float)
                made, states[text] = _after(layer, mine, states[text])
                wanted.append(made)
            if len(x) == 1:
                found = decoder.layer_step(0, x[0], angles[0], angles[0], ahead)[None]
                decoder.step(x[0], angles[0], angles[0], cache, logits)
            else:
                nowhere = np.zeros((0, 40), np.float32)
                decoder.step_tokens(x, angles, angles, cache, nowhere, kept=none, texts=texts)
            if texts == 1 and tokens > 1:
                found = decoder.layer_tokens(0, x, angles, angles, ahead)
            if texts == 1:
                largest = np.abs(wanted).max()
                np.testing.assert_allclose(found, wanted[0], atol=tolerance * largest)
            for text, state in enumerate(states):
                for side, one in zip(cache.read_memory(0), state, strict=True):
                    np.testing.assert_allclose(side[text], one, atol=tolerance * np.abs(one).max())


def test_a_step_can_be_taken_back_once() -> None:
    """The state before the last step is there until the next one."""
    decoder = _decoder([_layer("f32", _delta())])
    cache = decoder.new_cache()
    cache.store_memory(0, *_state(1))
    angles, none = np.zeros((3, 0), np.float32), np.zeros(0, np.int32)
    states = [cache.read_memory(0)]
    for _ in range(2):
        decoder.step_tokens(
            draw(3, D), angles, angles, cache, np.zeros((0, 40), np.float32), kept=none
        )
        states.append(cache.read_memory(0))
    with pytest.raises(ShapeError, match="2 positions of a state's last step of 3"):
        cache.drop(0, 2)
    cache.drop(0, 3)
    for found, wanted in zip(cache.read_memory(0), states[1], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_copied_cache_has_a_state_of_its_own() -> None:
    """Steps of one leave the other as it was, whichever of its two buffers is in use."""
    decoder = _decoder([_layer("f32", _delta()), make_layer()])
    cache: KeyValues = decoder.new_cache()
    cache.store_memory(0, *_state(1))
    cache.store(1, draw(2, 3, DIM), draw(2, 3, DIM))
    step = draw(D), np.ones(PAIRS, np.float32), np.ones(PAIRS, np.float32)
    logits, again = np.zeros(40, np.float32), np.zeros(40, np.float32)
    for _ in range(2):
        decoder.step(*step, cache, logits)
        other = copy.deepcopy(cache)
        held = other.read_memory(0)
        decoder.step(*step, cache, logits)
        for found, wanted in zip(other.read_memory(0), held, strict=True):
            np.testing.assert_array_equal(found, wanted)
        decoder.step(*step, other, again)
        np.testing.assert_array_equal(logits, again)


def test_shapes_that_are_none() -> None:
    """Each is refused by what does not fit."""
    with pytest.raises(ShapeError, match="heads share evenly"):
        _delta(key_dim=20)
    with pytest.raises(ShapeError, match="conv is"):
        _delta(conv=draw(TAPS, 3))
    with pytest.raises(ShapeError, match="takes a norm without mean"):
        _delta(norm=Norm(weight=draw(5), eps=1e-6))
    with pytest.raises(ShapeError, match="rows are given"):
        make_layer(delta=_delta())
