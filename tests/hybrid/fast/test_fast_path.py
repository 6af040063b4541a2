"""The fast path of models that transformers itself loads: there, and not to be noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)

from fast_models import BATCH, FAMILIES, PROMPT, converted, open_model, write, write_greedily
from hybrid.demo import demo_path
from hybrid.fast.attach import UNTESTED
from hybrid.ledger.slow_paths import slow_paths
from hybrid.model import Model
from hybrid.transformers_api import cache_argument, returned_cache
from hybrid.weights.checkpoint import convert

pytestmark = pytest.mark.usefixtures("half_precision_caches")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    convert(demo_path(), folder / "model", experts="q8_0")
    return folder / "model"


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2", "deepseek_v3"])
def test_families_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    """Nothing is tested at load; the first text is, and takes the path with the same tokens."""
    directory = converted(family, tmp_path)
    model, plain = open_model(directory), open_model(directory, fast=False)
    assert model.hybrid_fast.path == UNTESTED
    assert type(model).__name__ == type(plain).__name__
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.path.fast, model.hybrid_fast.path.reason
    assert not model.hybrid_fast.refused
    assert plain.hybrid_fast.decoder is None


def test_the_demo_and_a_pipeline(demo: Path) -> None:
    """A text pipeline writes what the model without the path writes."""
    tokenizer = AutoTokenizer.from_pretrained(demo)
    texts = []
    for fast in (True, False):
        model = open_model(demo, fast=fast)
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
    write(model)
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
        tokens = write(model, do_sample=True, temperature=0.9, top_k=20, streamer=told)
        assert told == tokens[0].tolist()
        found.append(tokens)
    assert torch.equal(*found)
    assert pair[0].hybrid_fast.path.fast


def test_assisted_decoding(pair: Any, qwen_folder: Path) -> None:
    """Model and assistant both have the path; candidates are fed at once and cropped."""
    assistant = open_model(qwen_folder)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = write(pair[0], assistant_model=assistant)
    assert torch.equal(found, write(pair[1]))
    assert pair[0].hybrid_fast.path.fast
    assert assistant.hybrid_fast.path.fast


LONG = torch.cat((BATCH, BATCH.flip(1), BATCH), dim=1)
PADDED = torch.ones_like(LONG)
PADDED[1, :3] = 0
HOLES = torch.ones_like(PROMPT)
HOLES[0, 2] = 0
CALLS: dict[str, tuple[torch.Tensor, dict[str, Any], str]] = {
    "long prompts": (LONG, {"attention_mask": PADDED}, "prompts of 2 sequences at once"),
    "padding": (
        torch.cat((LONG, LONG), dim=1)[1:],
        {"attention_mask": torch.cat((PADDED, torch.ones_like(LONG)), dim=1)[1:]},
        "a prompt of masked positions",
    ),
    "a hole": (PROMPT, {"attention_mask": HOLES}, "masked positions"),
    "no cache": (PROMPT, {"use_cache": False}, "no cache"),
    "attentions": (PROMPT, {"output_attentions": True}, "output_attentions"),
    "static cache": (PROMPT, {"cache_implementation": "static"}, "a cache of StaticCache"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_transformers_answers(pair: Any, name: str) -> None:
    """The same result as without the path, before and after it is in use, and the reason."""
    ids, options, reason = CALLS[name]
    model, plain = pair
    wanted = write(plain, ids, **options)
    assert torch.equal(write(model, ids, **options), wanted)
    model.hybrid_fast.refused.clear()
    write(model)
    assert not model.hybrid_fast.refused
    assert torch.equal(write(model, ids, **options), wanted)
    assert model.hybrid_fast.refused.total() == model.hybrid_fast.refused[reason] > 0
    (slow,) = [slow for slow in slow_paths(Model(model)) if slow.reason == reason]
    assert "steps in transformers' code" in slow.what


def test_a_cache_of_the_user(pair: Any) -> None:
    """A cache filled by either path goes on in generate()."""
    ids = torch.cat((PROMPT, PROMPT.flip(1)), dim=1)
    found = []
    for model in pair:
        for no_grad in (True, False):
            with torch.set_grad_enabled(not no_grad):
                cache = returned_cache(model(input_ids=PROMPT, use_cache=True))
            found.append(write(model, ids, **cache_argument(cache)))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_training_mode(pair: Any) -> None:
    """Dropout and jitter are transformers' business."""
    write(pair[0])
    assert torch.equal(write(pair[0].train()), write(pair[1].train()))
    assert pair[0].hybrid_fast.refused["training"]


def test_a_deleted_model_is_gone(qwen_folder: Path) -> None:
    """No cycle and no table holds it: its memory is free at once."""
    model = open_model(qwen_folder)
    write(model)
    assert model.hybrid_fast.path.fast
    gc.collect()
    gc.disable()
    try:
        seen = [weakref.ref(model), weakref.ref(model.hybrid_fast.decoder.decoder)]
        del model
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_several_models_at_once(qwen_folder: Path, demo: Path) -> None:
    """Models take turns token by token and do not see each other."""
    models = [open_model(qwen_folder), open_model(demo), open_model(qwen_folder)]
    alone = [write(model) for model in models]
    caches: list[Any] = [None] * 3
    rows = [PROMPT] * 3
    with torch.no_grad():
        for index, model in enumerate(models):
            caches[index] = returned_cache(model(input_ids=PROMPT[:, :-1], use_cache=True))
        for _ in range(12):
            for index, model in enumerate(models):
                out = model(input_ids=rows[index][:, -1:], **cache_argument(caches[index]))
                rows[index] = torch.cat((rows[index], out.logits[:, -1:].argmax(-1)), dim=1)
    assert all(torch.equal(a, b) for a, b in zip(alone, rows, strict=True))


def test_hooks_and_replaced_forwards_are_seen(pair: Any) -> None:
    """A hook on a part, another forward of a part: as in transformers."""

    def double(module: Any, args: Any, output: Any) -> Any:
        return output * 2

    model, plain = pair
    write(model)
    handles = [m.model.layers[0].mlp.register_forward_hook(double) for m in pair]
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.refused["hooks"]
    for handle in handles:
        handle.remove()
    for each in pair:
        norm = each.model.norm
        norm.forward = lambda x, norm=norm: -type(norm).forward(norm, x)
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.refused["a part's forward that was replaced"]
    for each in pair:
        del each.model.norm.forward
    model.hybrid_fast.refused.clear()
    assert torch.equal(write(model), write(plain))
    assert not model.hybrid_fast.refused


@pytest.mark.parametrize("where", ["part", "every module", "model"])
def test_hooks_before_the_first_text(pair: Any, where: str) -> None:
    """A hook is called as often as without the path, which is tested behind its back."""
    calls = [0, 0]
    for index, model in enumerate(pair):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        handle = {
            "part": model.model.layers[1].mlp.register_forward_hook,
            "every module": register_module_forward_pre_hook,
            "model": model.register_forward_hook,
        }[where](count)
        write(model)
        handle.remove()
    assert calls[0] == calls[1] > 0
    assert pair[0].hybrid_fast.path.fast == (where == "model")
    assert torch.equal(*(write(model) for model in pair))
    assert pair[0].hybrid_fast.path.fast


def test_masks_by_kind_of_layer(tmp_path: Path) -> None:
    """A mask that is a dictionary is transformers' business."""
    directory = converted("gpt_oss", tmp_path)
    mask = {"full_attention": None, "sliding_attention": None}
    found = []
    for model in (open_model(directory), open_model(directory, fast=False)):
        write(model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            out = model(input_ids=PROMPT, **cache_argument(cache), attention_mask=mask)
        found.append(out.logits)
        if model.hybrid_fast.path.fast:
            assert model.hybrid_fast.refused["a mask of dict"]
    assert torch.equal(*found)


def test_a_config_that_wants_tuples(pair: Any) -> None:
    """``config.return_dict = False`` holds before and after the path is in use."""
    for used in (False, True):
        for model in pair:
            config = model.config
            model.config = copy.copy(config)  # not the decoder's, which would be in our way
            model.config.return_dict = False
            with torch.no_grad():
                cache = DynamicCache(config=config)
                found = model(input_ids=PROMPT, **cache_argument(cache), use_cache=True)
            assert type(found) is tuple
            model.config = config
        assert pair[0].hybrid_fast.path.fast == used
        write(pair[0])


def test_a_compiled_model(pair: Any) -> None:
    """``torch.compile`` leaves what is ours alone, and changes nothing."""
    found = []
    for model, compiled in zip(
        pair, (torch.compile(pair[0], backend="eager"), pair[1]), strict=True
    ):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            rows = [compiled(input_ids=PROMPT, **cache_argument(cache), use_cache=True).logits]
            for token in (3, 4):
                ids = torch.tensor([[token]])
                rows.append(compiled(input_ids=ids, **cache_argument(cache), use_cache=True).logits)
        found.append(torch.cat(rows, dim=1))
    assert (found[0] - found[1]).abs().max() < 5e-3 * found[1].std()
    assert pair[0].hybrid_fast.path.fast


def test_switched_off_and_bodies_without_head(qwen_folder: Path) -> None:
    """The reason is kept where the report finds it, and nothing is replaced."""
    model = open_model(qwen_folder, fast=False)
    write(model)
    assert str(model.hybrid_fast.path) == "transformers (switched off: fast=False)"
    (slow,) = [slow for slow in slow_paths(Model(model)) if "switched off" in slow.reason]
    assert slow.remedy == "leave out fast=False"
    body = AutoModel.from_pretrained(qwen_folder)
    assert str(body.hybrid_fast.path) == "transformers (the model does not generate text)"


def test_greedy_logits_are_those_of_the_general_path(pair: Any) -> None:
    """Not only the same tokens: the logits, to rounding."""
    (tokens, logits), (plain_tokens, plain_logits) = (write_greedily(model) for model in pair)
    assert torch.equal(tokens, plain_tokens)
    assert (logits - plain_logits).abs().max() < 5e-3 * plain_logits.std()
