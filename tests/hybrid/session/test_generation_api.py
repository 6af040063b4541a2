"""Everything that transformers' ``generate`` offers, beside transformers' own model: one table.

A call gives what a plain model gives, or is refused as that one refuses it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from hybrid.grafts import fast_path_of
from hybrid.weights.checkpoint import convert
from tiny_model import save_tiny_model

PROMPT = list(b"def main():\n    ")
TOKENS = 12


class Both(NamedTuple):
    """The same weights with packed experts and as transformers has them, and their tokenizer."""

    packed: Any
    plain: Any
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("generation")
    save_tiny_model(folder / "plain")
    convert(folder / "plain", folder / "packed", experts="f32")
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for name in ("packed", "plain")
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    for model in models:
        model.generation_config.pad_token_id = 0
    return Both(*models, tokenizer, folder)


def _ids(*prompts: list[int]) -> torch.Tensor:
    return torch.tensor(list(prompts))


class _Banned(LogitsProcessor):
    """Lets no even token through."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] = -torch.inf
        return scores


PADDED = {
    "inputs": _ids([0] * 5 + PROMPT[:-5], PROMPT),
    "attention_mask": torch.tensor([[0] * 5 + [1] * (len(PROMPT) - 5), [1] * len(PROMPT)]),
}

#: Options of a call, all with ``TOKENS`` new tokens and greedy unless they say otherwise.
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "sampling, all filters": {
        "do_sample": True,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.99,
        "epsilon_cutoff": 1e-5,
        "eta_cutoff": 1e-5,
    },
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "lengths": {"min_new_tokens": 5, "eos_token_id": [3, 7]},
    "suppressed tokens": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [9]},
    "bad words": {"bad_words_ids": [[65], [66, 67]]},
    "biased words": {"sequence_bias": [[[65], 4.0]]},
    "own processor": {"logits_processor": [_Banned()]},
    "guidance": {"guidance_scale": 1.5},
    "forced end": {"forced_eos_token_id": 3},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams, early": {"num_beams": 3, "early_stopping": True, "eos_token_id": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "batch": PADDED,
    "batch of beams": {**PADDED, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "quantized cache": {"cache_implementation": "quantized"},
    "unknown cache": {"cache_implementation": "none of these"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "stop strings": {"stop_strings": ["e", "zzz"]},
    "time limit": {"max_time": 60.0},
    "scores": {"output_scores": True, "output_logits": True},
    "hidden states": {"output_hidden_states": True},
    "misspelt": {"temprature": 0.5},
    "negative": {"max_new_tokens": -1},
}


def _call(model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    """What a call returns, or the type and the first words of what it raises."""
    given: dict[str, Any] = {"inputs": _ids(PROMPT), "max_new_tokens": TOKENS, "do_sample": False}
    given |= {"return_dict_in_generate": True} | options
    if "stop_strings" in options:
        given["tokenizer"] = tokenizer
    torch.manual_seed(3)
    try:
        return model.generate(**given)
    except Exception as error:
        return type(error).__name__, str(error)[:60]


def _same(found: Any, wanted: Any, where: str) -> None:
    """Compare outputs, nested as they are."""
    if isinstance(wanted, torch.Tensor):
        if wanted.is_floating_point():
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found, wanted), where
    elif isinstance(wanted, tuple):
        assert len(found) == len(wanted), where
        for one, other in zip(found, wanted, strict=True):
            _same(one, other, where)
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_a_plain_model_gives(both: Both, name: str) -> None:
    """Token for token, scores and states included, or the same refusal."""
    found, wanted = (
        _call(model, both.tokenizer, CALLS[name]) for model in (both.packed, both.plain)
    )
    if isinstance(wanted, tuple) and isinstance(wanted[0], str):
        assert found == wanted
        return
    assert not isinstance(found, tuple), f"refused: {found}"
    assert found.keys() == wanted.keys()
    for key in wanted:
        if key != "past_key_values" and key != "cache":
            _same(found[key], wanted[key], key)


def _lengths(sequences: torch.Tensor) -> int:
    return sequences.shape[1] - len(PROMPT)


def _masked(model: Any, both: Both) -> Any:
    """A hole in the prompt, and positions that say so."""
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    mask[0, 4:7] = 0
    return model(
        input_ids=_ids(PROMPT), attention_mask=mask, position_ids=mask.cumsum(-1).clamp(1) - 1
    ).logits


def _four_dimensional_mask(model: Any, both: Both) -> Any:
    seen = torch.ones(len(PROMPT), len(PROMPT), dtype=torch.bool).tril()
    seen[:, 3] = False
    seen[3, 3] = True
    return model(input_ids=_ids(PROMPT), attention_mask=seen[None, None]).logits


def _embeddings(model: Any, both: Both) -> Any:
    embedded = model.get_input_embeddings()(_ids(PROMPT))
    return model.generate(inputs_embeds=embedded, max_new_tokens=TOKENS, do_sample=False)


def _by_hand(model: Any, both: Both) -> Any:
    """Token by token with the cache that a call returned."""
    cache_name = "cache" if "cache" in model(_ids(PROMPT)) else "past_key_values"
    step, found = model(_ids(PROMPT), use_cache=True), []
    for _ in range(TOKENS):
        token = step.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        step = model(token, use_cache=True, **{cache_name: step[cache_name]})
    return torch.tensor(found)


def _continued(model: Any, both: Both) -> Any:
    """A second call that goes on from the first one's cache."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(_ids(PROMPT), **options)
    name = "cache" if "cache" in first else "past_key_values"
    longer = torch.cat([first.sequences, _ids(list(b"x = 1"))], dim=1)
    return model.generate(longer, **{name: first[name]}, **options).sequences


def _assisted(model: Any, both: Both) -> Any:
    return model.generate(
        _ids(PROMPT), assistant_model=both.plain, max_new_tokens=TOKENS, do_sample=False
    )


def _streamed(model: Any, both: Both) -> Any:
    """Texts as they come, in a thread of its own."""
    streamer = TextIteratorStreamer(both.tokenizer, timeout=60.0)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(_ids(PROMPT),), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def _streamed_asynchronously(model: Any, both: Both) -> Any:
    async def text() -> str:
        streamer = AsyncTextIteratorStreamer(both.tokenizer, timeout=60.0)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, args=(_ids(PROMPT),), kwargs=options)
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return "".join(pieces)

    return asyncio.run(text())


def _own_settings(model: Any, both: Both) -> Any:
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.2)
    return model.generate(_ids(PROMPT), generation_config=settings)


WAYS: dict[str, Callable[[Any, Both], Any]] = {
    "masked": _masked,
    "four-dimensional mask": _four_dimensional_mask,
    "embeddings": _embeddings,
    "cache by hand": _by_hand,
    "cache of a call": _continued,
    "assistant": _assisted,
    "streamed": _streamed,
    "streamed asynchronously": _streamed_asynchronously,
    "own settings": _own_settings,
}


@pytest.mark.parametrize("name", WAYS)
def test_other_ways_in(both: Both, name: str) -> None:
    """Masks, embeddings, caches and streamers of the caller's."""
    with torch.no_grad():
        found, wanted = (WAYS[name](model, both) for model in (both.packed, both.plain))
    _same(found, wanted, name)


def test_a_streamer_on_the_screen(both: Both, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt left out, whole text printed."""
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    for model in (both.packed, both.plain):
        model.generate(
            _ids(PROMPT), streamer=TextStreamer(both.tokenizer, skip_prompt=True), **options
        )
    said = capsys.readouterr().out
    half = len(said) // 2
    assert said[:half] == said[half:] != ""


def test_time_is_up(both: Both) -> None:
    """A limit that has passed ends after one token, as transformers counts."""
    criteria = StoppingCriteriaList([MaxTimeCriteria(1.0, time.time() - 2.0)])
    found = both.packed.generate(
        _ids(PROMPT), max_new_tokens=TOKENS, do_sample=False, stopping_criteria=criteria
    )
    assert _lengths(found) == 1
    assert _lengths(both.packed.generate(_ids(PROMPT), max_new_tokens=TOKENS, max_time=0.0)) == 1


def test_attentions(both: Both) -> None:
    """Weights of attention, which only transformers' eager code has."""
    options = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 2}
    outputs = []
    for model in (both.packed, both.plain):
        model.set_attn_implementation("eager")
        outputs.append(model.generate(_ids(PROMPT), do_sample=False, **options))
        model.set_attn_implementation("sdpa")
    found, wanted = outputs
    assert wanted.attentions[0][0] is not None
    _same(found.attentions, wanted.attentions, "attentions")


def test_continuous_batching(both: Both) -> None:
    """Two prompts of different lengths share steps."""
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=255, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    texts = []
    for model in (both.packed, both.plain):
        found = model.generate_batch(
            inputs=[PROMPT, PROMPT[:7]],
            generation_config=settings,
            continuous_batching_config=small,
            warmup=False,
        )
        texts.append([each.generated_tokens for each in found.values()])
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [3, 3]


def test_the_fast_path_was_there(both: Both) -> None:
    """All of this was asked of a model that has it."""
    assert fast_path_of(both.packed) is not None
    assert fast_path_of(both.plain) is None
