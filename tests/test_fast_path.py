"""The fast path of models that transformers itself loads: there, and not to be noticed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from hybrid.config import HybridConfig
from hybrid.conversion.checkpoint import convert
from hybrid.demo import demo_path
from hybrid.fast.attach import UNTESTED
from hybrid.slow_paths import slow_paths
from test_decode import FAMILIES, PROMPT, _greedy, _save, half_precision_caches

__all__ = ["half_precision_caches"]  # applies to the tests here, too


def _load(directory: Path, **options: Any) -> Any:
    asked = {"quantization_config": HybridConfig(**options)} if options else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **asked)
    model.generation_config.eos_token_id = None
    return model


def _converted(family: str, folder: Path) -> Path:
    _save(family, folder / "source")
    convert(folder / "source", folder / "model", experts="f32")
    return folder / "model"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _converted("qwen3_moe", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    convert(demo_path(), folder / "model", experts="q8_0")
    return folder / "model"


@pytest.fixture
def pair(qwen: Path) -> tuple[Any, Any]:
    """One model with the fast path, one without."""
    return _load(qwen), _load(qwen, fast=False)


def _write(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    settings.setdefault("attention_mask", torch.ones_like(ids))
    found: torch.Tensor = model.generate(ids, **settings)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2", "deepseek_v3"])
def test_families_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    """Nothing is tested at load; the first text is, and takes the path with the same tokens."""
    directory = _converted(family, tmp_path)
    model, plain = _load(directory), _load(directory, fast=False)
    assert model.hybrid_fast.path == UNTESTED
    assert type(model).__name__ == type(plain).__name__
    assert torch.equal(_write(model), _write(plain))
    assert model.hybrid_fast.path.fast, model.hybrid_fast.path.reason
    assert not model.hybrid_fast.refused
    assert plain.hybrid_fast.decoder is None


def test_the_demo_and_a_pipeline(demo: Path) -> None:
    """A text pipeline writes what the model without the path writes."""
    tokenizer = AutoTokenizer.from_pretrained(demo)
    texts = []
    for fast in (True, False):
        model = _load(demo, fast=fast)
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"max_new_tokens": 24, "do_sample": False}
        texts.append(write("A planner", **settings)[0]["generated_text"])
        assert model.hybrid_fast.path.fast == fast
        assert not model.hybrid_fast.refused
    assert texts[0] == texts[1]


def test_the_demo_in_bfloat16(demo: Path) -> None:
    """What transformers loads unless it is asked for another dtype."""
    model = AutoModelForCausalLM.from_pretrained(demo)
    assert model.dtype == torch.bfloat16
    _write(model)
    assert model.hybrid_fast.path.fast, model.hybrid_fast.path.reason


def test_sampling_and_a_streamer(pair: Any) -> None:
    """One seed, one text, told token by token."""

    class Told(list[int]):
        def put(self, value: torch.Tensor) -> None:
            self.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            pass

    found = []
    for model in pair:
        told = Told()
        torch.manual_seed(5)
        tokens = _write(model, do_sample=True, temperature=0.9, top_k=20, streamer=told)
        assert told == tokens[0].tolist()
        found.append(tokens)
    assert torch.equal(*found)
    assert pair[0].hybrid_fast.path.fast


def test_assisted_decoding(pair: Any, qwen: Path) -> None:
    """Model and assistant both have the path; candidates are fed at once and cropped."""
    assistant = _load(qwen)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = _write(pair[0], assistant_model=assistant)
    assert torch.equal(found, _write(pair[1]))
    assert pair[0].hybrid_fast.path.fast
    assert assistant.hybrid_fast.path.fast


BATCH = torch.cat((PROMPT, PROMPT.flip(1)))
PADDED = torch.ones_like(BATCH)
PADDED[1, :3] = 0
CALLS: dict[str, tuple[torch.Tensor, dict[str, Any], str]] = {
    "two sequences": (BATCH, {"attention_mask": PADDED}, "2 sequences at once"),
    "beams": (PROMPT, {"num_beams": 3}, "3 sequences at once"),
    "no cache": (PROMPT, {"use_cache": False}, "no cache"),
    "padding": (PROMPT, {"attention_mask": PADDED[1:]}, "masked positions"),
    "attentions": (PROMPT, {"output_attentions": True}, "output_attentions"),
    "static cache": (PROMPT, {"cache_implementation": "static"}, "a cache of StaticCache"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_transformers_answers(pair: Any, name: str) -> None:
    """The same result as without the path, before and after it is in use, and the reason."""
    ids, options, reason = CALLS[name]
    model, plain = pair
    wanted = _write(plain, ids, **options)
    assert torch.equal(_write(model, ids, **options), wanted)
    _write(model)
    assert not model.hybrid_fast.refused
    assert torch.equal(_write(model, ids, **options), wanted)
    assert model.hybrid_fast.refused.total() == model.hybrid_fast.refused[reason] > 0
    (slow,) = [slow for slow in slow_paths(model) if slow.reason == reason]
    assert "steps in transformers' code" in slow.what


def test_a_cache_of_the_user(pair: Any) -> None:
    """A cache filled by either path goes on in generate()."""
    ids = torch.cat((PROMPT, PROMPT.flip(1)), dim=1)
    found = []
    for model in pair:
        for no_grad in (True, False):
            with torch.set_grad_enabled(not no_grad):
                cache = model(input_ids=PROMPT, use_cache=True).past_key_values
            found.append(_write(model, ids, past_key_values=cache))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_gradients_after_a_text(pair: Any) -> None:
    """Weights come back as the same parameters, their gradients are transformers' own."""
    model, plain = pair
    before = dict(model.named_parameters())
    _write(model)
    assert "lm_head.weight" not in dict(model.named_parameters())
    for each in pair:
        each(input_ids=PROMPT, labels=PROMPT).loss.backward()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, parameter in plain.named_parameters():
        assert after[name] is before[name]
        assert torch.equal(after[name], parameter), name
        torch.testing.assert_close(after[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(_write(model), _write(plain))
    assert model.hybrid_fast.path.fast


def test_training_mode(pair: Any) -> None:
    """Dropout and jitter are transformers' business."""
    _write(pair[0])
    assert torch.equal(_write(pair[0].train()), _write(pair[1].train()))
    assert pair[0].hybrid_fast.refused["training"]


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    """Embedding and lm_head share one parameter again, and the model knows it."""
    _save("qwen3_moe", tmp_path / "source", tie_word_embeddings=True)
    convert(tmp_path / "source", tmp_path / "model", experts="f32")
    model = _load(tmp_path / "model")
    tied, weight = dict(model.all_tied_weights_keys), model.lm_head.weight
    wanted = weight.clone()
    _write(model)
    assert model.lm_head.weight is not weight
    model.hybrid_fast.release(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert torch.equal(weight, wanted)
    assert model.all_tied_weights_keys == tied


def test_a_shared_expert_comes_back(tmp_path: Path) -> None:
    """An MLP whose matrices were laid out in one block has them again."""
    model = _load(_converted("qwen2_moe", tmp_path))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    _write(model)
    model.hybrid_fast.release(model)
    found = model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_moving_and_casting(pair: Any) -> None:
    """The model is cast as if nothing were packed, and tested again afterwards."""
    model, plain = pair
    _write(model)
    model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    assert model.hybrid_fast.path == UNTESTED
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    for each in pair:
        each.to(torch.float32)
    assert torch.equal(_write(model), _write(plain))
    assert model.hybrid_fast.path.fast
    assert model.lm_head.weight_format == "bf16"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stand_by_themselves(pair: Any, how: str, used: bool) -> None:
    """A copy writes the same text on its own fast path, also when the original is gone."""
    model = pair[0]
    if used:
        _write(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert torch.equal(_write(twin), _write(pair[1]))
    assert twin.hybrid_fast.path.fast
    assert twin.hybrid_fast.decoder is not pair[0].hybrid_fast.decoder


def test_a_deleted_model_is_gone(qwen: Path) -> None:
    """No cycle and no table holds it: its memory is free at once."""
    model = _load(qwen)
    _write(model)
    assert model.hybrid_fast.path.fast
    gc.collect()
    gc.disable()
    try:
        seen = [weakref.ref(model), weakref.ref(model.hybrid_fast.decoder.decoder)]
        del model
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_several_models_at_once(qwen: Path, demo: Path) -> None:
    """Models take turns token by token and do not see each other."""
    models = [_load(qwen), _load(demo), _load(qwen)]
    alone = [_write(model) for model in models]
    caches: list[Any] = [None] * 3
    rows = [PROMPT] * 3
    with torch.no_grad():
        for index, model in enumerate(models):
            caches[index] = model(input_ids=PROMPT[:, :-1], use_cache=True).past_key_values
        for _ in range(12):
            for index, model in enumerate(models):
                out = model(input_ids=rows[index][:, -1:], past_key_values=caches[index])
                rows[index] = torch.cat((rows[index], out.logits[:, -1:].argmax(-1)), dim=1)
    assert all(torch.equal(a, b) for a, b in zip(alone, rows, strict=True))


def test_hooks_and_other_weights_are_seen(pair: Any) -> None:
    """A hook on a part, a module in a part's place, a norm that is written: as in transformers."""

    def double(module: Any, args: Any, output: Any) -> Any:
        return output * 2

    def swap(model: Any) -> None:
        torch.manual_seed(2)
        model.lm_head = nn.Linear(64, 96, bias=False)

    def write(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[:9] = 0

    model, plain = pair
    _write(model)
    handles = [m.model.layers[0].mlp.register_forward_hook(double) for m in pair]
    assert torch.equal(_write(model), _write(plain))
    assert model.hybrid_fast.refused["hooks"]
    for handle in handles:
        handle.remove()
    for each in pair:
        norm = each.model.norm
        norm.forward = lambda x, norm=norm: -type(norm).forward(norm, x)
    assert torch.equal(_write(model), _write(plain))
    assert model.hybrid_fast.refused["a part's forward that was replaced"]
    for each in pair:
        del each.model.norm.forward
    for change in (swap, write):
        before = _write(plain)
        for each in pair:
            change(each)
        found = _write(model)
        assert torch.equal(found, _write(plain))
        assert not torch.equal(found, before)
        assert model.hybrid_fast.path.fast


def test_switched_off_and_bodies_without_head(qwen: Path) -> None:
    """The reason is kept where the report finds it, and nothing is replaced."""
    model = _load(qwen, fast=False)
    _write(model)
    assert str(model.hybrid_fast.path) == "transformers (switched off: fast=False)"
    (slow,) = [slow for slow in slow_paths(model) if "switched off" in slow.reason]
    assert slow.remedy == "leave out fast=False"
    body = AutoModel.from_pretrained(qwen)
    assert str(body.hybrid_fast.path) == "transformers (the model does not generate text)"


def test_greedy_logits_are_those_of_the_general_path(pair: Any) -> None:
    """Not only the same tokens: the logits, to rounding."""
    (tokens, logits), (plain_tokens, plain_logits) = (_greedy(model) for model in pair)
    assert torch.equal(tokens, plain_tokens)
    assert (logits - plain_logits).abs().max() < 5e-3 * plain_logits.std()
