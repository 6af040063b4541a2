"""Caches in the kernels' layout: their copies, other models' caches, caches without a config."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from cpu_experts.decoder.kv import KeyValues
from fast_models import PROMPT, save_family
from hybrid.transformers_api import cache_argument
from hybrid.weights.checkpoint import convert
from hybrid.weights.config import HybridConfig
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

#: Tokens written for one sequence of a test, not the same ones for any two sequences.
_STEPS = 6
#: Why a cache goes to transformers' code.
_REFUSED = "a cache that the kernels cannot take over"
#: How one gets another cache with the same content.
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}

Load = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a family's model with and without the fast path, made once."""

    @cache
    def pair(family: str, **changes: Any) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp(family)
        save_family(family, folder / "source", **changes)
        convert(folder / "source", folder / "model", experts="f32")
        return _read(folder / "model"), _read(folder / "model", fast=False)

    return pair


def _read(directory: Path, **options: Any) -> Any:
    asked = {"quantization_config": HybridConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **asked)


@torch.no_grad()
def _feed(model: Any, ids: Tensor, kept: Any) -> Tensor:
    """Logits ``[V]`` of the last token of ``ids`` ``[1, T]`` behind what is ``kept``."""
    logits: Tensor = model(input_ids=ids, **cache_argument(kept), use_cache=True).logits[0, -1]
    return logits


def _token(step: int, which: int = 0) -> Tensor:
    return torch.tensor([[(7 * step + 31 * which + 3) % VOCAB]])


def _text(length: int) -> Tensor:
    return torch.arange(length)[None] * 5 % VOCAB


def _write(model: Any, *caches: Any) -> Tensor:
    """Write a text of its own into every cache, a token into each in turn."""
    rows = [
        _feed(model, _token(step, which), kept)
        for step in range(_STEPS)
        for which, kept in enumerate(caches)
    ]
    return torch.stack(rows)


def _assert_same(model: Any, plain: Any, run: Callable[[Any], Tensor], refused: int = 0) -> None:
    """``run`` gives both models the same logits; so many calls do not take the fast path."""
    wanted = run(plain)
    model.hybrid_fast.refused.clear()
    distance = (run(model) - wanted).abs().max() / wanted.std()
    assert distance < 5e-3
    assert model.hybrid_fast.path.fast, model.hybrid_fast.path.reason
    assert model.hybrid_fast.refused == ({_REFUSED: refused} if refused else {})


def _message(run: Callable[[Any], Tensor], model: Any) -> str:
    with pytest.raises(RuntimeError) as raised:
        run(model)
    return str(raised.value)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_copies_go_their_own_ways(load: Load, family: str, how: str) -> None:
    """A prompt's cache and two copies, written in turn, then copies whose original is gone."""

    def beside_the_original(model: Any) -> Tensor:
        kept: Any = DynamicCache(config=model.config)
        _feed(model, PROMPT, kept)
        _feed(model, _token(0), kept)
        return _write(model, kept, COPIES[how](kept), COPIES[how](kept))

    def alone(model: Any) -> Tensor:
        kept: Any = DynamicCache(config=model.config)
        _feed(model, PROMPT, kept)
        _feed(model, _token(0), kept)
        copies = [COPIES[how](kept) for _ in range(2)]
        del kept
        gc.collect()
        others = [torch.full((4096,), 1e30) for _ in range(50)]  # where the original may have been
        found = _write(model, *copies)
        del others
        return found

    for run in (beside_the_original, alone):
        _assert_same(*load(family), run)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_copied_layers_stay_as_they_were(load: Load, family: str) -> None:
    """Shallow copies of layers are a snapshot, as they are of transformers' tensors."""

    def run(model: Any) -> Tensor:
        kept: Any = DynamicCache(config=model.config)
        _feed(model, PROMPT, kept)
        _feed(model, _token(0), kept)
        snapshot: Any = DynamicCache(config=model.config)
        snapshot.layers = [copy.copy(layer) for layer in kept.layers]
        return torch.cat((_write(model, kept), _write(model, snapshot)))

    _assert_same(*load(family), run)


OTHERS = {
    "heads": ("qwen3_moe", {"num_key_value_heads": 4}),
    "head size": ("qwen3_moe", {"head_dim": 32}),
    "latent": ("deepseek_v2", {"kv_lora_rank": 32}),
}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_cache_of_other_shapes(load: Load, what: str, packed: bool, reset: bool) -> None:
    """transformers' own error, and its own model goes on; a cache that was reset fits all."""
    family, changes = OTHERS[what]
    first, second = load(family), load(family, **changes)

    def taken_over(ours: Any, other: Any) -> Tensor:
        kept: Any = DynamicCache(config=ours.config)
        _feed(ours, PROMPT, kept)
        if packed:
            _feed(ours, _token(0), kept)
        if reset:
            kept.reset()
            _feed(other, _text(40), kept)
            return _write(other, kept)
        messages = {_message(lambda m: _feed(m, _token(0), kept), other) for _ in range(2)}
        assert len(messages) == 1
        found.append(messages.pop())
        return _write(ours, kept)

    for (ours, plain), (other, plain_other) in ((first, second), (second, first)):
        found: list[str] = []
        _feed(other, PROMPT, DynamicCache(config=other.config))
        other.hybrid_fast.refused.clear()
        wanted = taken_over(plain, plain_other)
        distance = (taken_over(ours, other) - wanted).abs().max() / wanted.std()
        assert distance < 5e-3
        assert found == [] if reset else found[0] == found[1]
        assert other.hybrid_fast.refused == ({} if reset else {_REFUSED: 2})


@pytest.mark.parametrize(("made_with", "read_with"), [(4, 8), (8, 4), (None, 4), (4, None)])
def test_a_cache_of_another_window(
    load: Load, made_with: int | None, read_with: int | None
) -> None:
    """What transformers computes with what the cache has kept; fast where that is everything."""
    first = load("mixtral", sliding_window=made_with)
    second = load("mixtral", sliding_window=read_with)
    _feed(second[0], PROMPT, DynamicCache(config=second[0].config))

    for ids in (_text(3), _text(30)):
        kept: list[Any] = [DynamicCache(config=model.config) for model in first]
        found = []
        second[0].hybrid_fast.refused.clear()
        for ours, other, own in zip(first, second, kept, strict=True):
            _feed(ours, ids, own)
            _feed(ours, _token(0), own)
            found.append(torch.cat((_write(other, own), _feed(other, ids, own)[None])))
        distance = (found[0] - found[1]).abs().max() / found[1].std()
        assert distance < 5e-3
        refused = {} if made_with is None else {_REFUSED: _STEPS + 1}
        assert second[0].hybrid_fast.refused == refused
        assert kept[0].layers[0].keys.shape == kept[1].layers[0].keys.shape


def test_a_cache_of_another_dtype(load: Load) -> None:
    """A bfloat16 cache of a float32 model is not packed until transformers has widened it."""
    model, plain = load("qwen3_moe")

    def run(model: Any) -> Tensor:
        kept: Any = DynamicCache(config=model.config)
        _feed(model, PROMPT, kept)
        for layer in kept.layers:
            layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
        return _write(model, kept)

    _assert_same(model, plain, run, refused=1)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_another_model_of_the_same_shapes(load: Load, family: str) -> None:
    """It goes on with the cache on the fast path, and the first model after it."""
    first, second = load(family), load(family, moe_intermediate_size=24)
    found = []
    for ours, other in zip(first, second, strict=True):
        _feed(other, PROMPT, DynamicCache(config=other.config))
        kept: Any = DynamicCache(config=ours.config)
        _feed(ours, PROMPT, kept)
        for model in (ours, other):
            model.hybrid_fast.refused.clear()
        found.append(torch.cat([_write(m, kept) for m in (ours, other, other, ours)]))
        assert not ours.hybrid_fast.refused
        assert not other.hybrid_fast.refused
    assert (found[0] - found[1]).abs().max() / found[1].std() < 5e-3


def test_a_changed_model_takes_over(load: Load) -> None:
    """Weights that changed since a model's last text count for the first token of a cache."""
    first = load("qwen3_moe")
    second = [copy.deepcopy(model) for model in load("qwen3_moe", moe_intermediate_size=24)]
    found = []
    for ours, other in zip(first, second, strict=True):
        _write(other, DynamicCache(config=other.config))
        kept: Any = DynamicCache(config=ours.config)
        _feed(ours, PROMPT, kept)
        _feed(ours, _token(0), kept)
        with torch.no_grad():
            other.model.norm.weight.mul_(torch.linspace(-1, 1, other.config.hidden_size))
        found.append(_write(other, kept))
    assert (found[0] - found[1]).abs().max() / found[1].std() < 5e-3


WITHOUT_CONFIG: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "a window": ("mixtral", {"sliding_window": 8}),
    "two kinds of layers": ("gpt_oss", {"sliding_window": 8}),
}


@pytest.mark.parametrize("length", [1, 30, 600])
@pytest.mark.parametrize("what", WITHOUT_CONFIG)
def test_a_cache_without_a_config(
    load: Load, what: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is computed by the kernels, too, and it keeps what leaves a window."""
    family, changes = WITHOUT_CONFIG[what]
    model, plain = load(family, **changes)
    _feed(model, PROMPT, DynamicCache())
    calls: list[str] = []
    decoder = model.hybrid_fast.decoder

    def count(name: str) -> None:
        real = getattr(decoder, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(decoder, name, counted)

    for name in ("forward", "step", "prompt"):
        count(name)
    kept: list[Any] = []

    def run(model: Any) -> Tensor:
        kept.append(DynamicCache())
        prompt = _feed(model, _text(length), kept[-1])[None]
        return torch.cat((prompt, _write(model, kept[-1]), _feed(model, PROMPT, kept[-1])[None]))

    _assert_same(model, plain, run)
    first = {1: "forward", 30: "step", 600: "prompt"}[length]
    assert calls == [first, *["forward"] * _STEPS, "step"]
    shapes = [[layer.keys.shape for layer in one.layers] for one in kept]
    assert shapes[0] == shapes[1]
    assert kept[1].get_seq_length() == length + _STEPS + PROMPT.shape[1]


def test_layers_of_two_caches(load: Load) -> None:
    """Layers in another order than the kernels know belong to transformers' code."""

    def run(model: Any) -> Tensor:
        kept: Any = DynamicCache(config=model.config)
        _feed(model, PROMPT, kept)
        _feed(model, _token(0), kept)
        kept.layers.reverse()
        return _write(model, kept)

    _assert_same(*load("qwen3_moe"), run, refused=_STEPS)


@pytest.mark.parametrize("how", [*COPIES.values(), copy.copy])
def test_a_copy_points_to_its_own_buffers(how: Callable[[Any], Any]) -> None:
    """The addresses that kernels get are those of the arrays that the copy reads."""
    rng = np.random.default_rng(0)
    kept = KeyValues([0, 8])
    keys, values = (rng.standard_normal((2, 5, 16)).astype(np.float32) for _ in range(2))
    kept.store(1, keys, values)
    copied = how(kept)
    buffers = copied._layers[1]
    assert copied.states[1]["keys"] == buffers.keys.ctypes.data
    assert copied.states[1]["values"] == buffers.values.ctypes.data
    assert not copied.states[0]["keys"]
    for found, wanted in zip(copied.read(1), kept.read(1), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_layer_that_gets_other_shapes() -> None:
    """Buffers that are long enough but of other heads are not written into."""
    rng = np.random.default_rng(0)
    kept = KeyValues([0])
    for shape in ((2, 5, 16), (4, 5, 16), (1, 9, 48)):
        sides = [rng.standard_normal(shape).astype(np.float16).astype(np.float32) for _ in "kv"]
        kept.store(0, *sides)
        for found, wanted in zip(kept.read(0), sides, strict=True):
            np.testing.assert_array_equal(found, wanted)
