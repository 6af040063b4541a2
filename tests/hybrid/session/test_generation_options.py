"""What a text's options come to: the model's own settings, what is switched off, what ends it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hybrid.cli import main
from hybrid.cli.generation import read_text
from hybrid.cli.options import sampling_options
from hybrid.errors import UsageError
from hybrid.session.conversation import Conversation
from hybrid.session.generation_options import (
    end_tokens,
    left_out,
    sampling_told,
    text_options,
    text_settings,
)
from hybrid.session.model import HybridModel
from hybrid.session.spine import _warm_up
from tiny_model import TEMPLATE


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> HybridModel:
    found = HybridModel.from_pretrained(tiny_model, threads=1)
    found.tokenizer.chat_template = TEMPLATE
    return found


def holder(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**settings)


@pytest.mark.parametrize(
    ("own", "config", "inner", "tokenizer", "ends"),
    [
        ([5, 6], 5, None, 7, [5, 6, 7]),
        (None, [], 3, None, [3]),
        ([], None, None, None, []),
        (0, 0, 0, 0, [0]),
    ],
)
def test_a_text_ends_at_whatever_is_named(
    own: Any, config: Any, inner: Any, tokenizer: Any, ends: list[int]
) -> None:
    """In settings, config, the text's config and the tokenizer; empty lists and nulls are none."""
    text = holder(eos_token_id=inner)
    network = holder(
        generation_config=holder(eos_token_id=own),
        config=holder(eos_token_id=config, get_text_config=lambda: text),
    )
    assert end_tokens(network, holder(eos_token_id=tokenizer)) == ends


def test_what_a_text_cannot_have_is_left_out_with_a_word() -> None:
    """Beams and several sequences of the model's own settings; who asks for them gets them."""
    config = GenerationConfig(num_beams=4, num_return_sequences=2)
    assert [note.what.split()[:2] for note in left_out(config)] == [
        ["num_beams", "4"],
        ["num_return_sequences", "2"],
    ]
    plain = text_settings(config)
    assert (plain.num_beams, plain.num_return_sequences) == (None, None)
    assert config.num_beams == 4
    assert text_options(plain, {"num_beams": 3}, 5)["num_beams"] == 3
    assert list(left_out(GenerationConfig())) == []


OWN: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "num_beam_groups": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "compile_config": {"fullgraph": True},
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [1],
    "force_words_ids": [[1]],
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "is_assistant": True,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "token_healing": True,
}
FOLLOWED: dict[str, Any] = {
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"},
    "prompt_lookup_num_tokens": 2,
    "prefill_chunk_size": 2,
    "max_time": 100.0,
    "min_new_tokens": 2,
    "bad_words_ids": [[97]],
    "suppress_tokens": [98],
    "begin_suppress_tokens": [99],
    "sequence_bias": [[[97], -1.0]],
    "exponential_decay_length_penalty": [2, 1.1],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "encoder_repetition_penalty": 1.2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "max_cache_len": 50,
    "disable_compile": True,
    "low_memory": True,
    "length_penalty": 2.0,
    "early_stopping": True,
    "diversity_penalty": 1.0,
    "num_assistant_tokens": 3,
    "epsilon_cutoff": 0.1,
    "top_h": 0.5,
}


@pytest.mark.parametrize("name", [*OWN, *FOLLOWED])
def test_settings_of_the_models_own(name: str, model: HybridModel) -> None:
    """Whatever a generation_config.json asks for: a text and a conversation come of it.

    What a text cannot have is named when the model is loaded, once, and left out.
    """
    settings = GenerationConfig()
    setattr(settings, name, (OWN | FOLLOWED)[name])
    told = [note.what.split()[0] for note in left_out(settings)]
    assert told == ([name] if name in OWN else [])
    before, model.model.generation_config = model.model.generation_config, settings
    try:
        assert model.generate("abcabc", max_new_tokens=4)
        conversation = Conversation(model)
        for text in ("abc", "de"):
            assert conversation.ask(text, max_new_tokens=4)
        _warm_up(model._session)
        assert model.model.generation_config is settings
    finally:
        model.model.generation_config = before


def test_ids_that_the_model_does_not_know(model: HybridModel) -> None:
    """A token that was added to the tokenizer alone is named, with both numbers."""
    words = copy.deepcopy(model.tokenizer)
    words.add_tokens(["<image>"])
    before, model.tokenizer = model.tokenizer, words
    try:
        for prompt in ("a<image>b", torch.tensor([[5, 256]])):
            with pytest.raises(UsageError) as caught:
                model.generate(prompt, max_new_tokens=2)
            assert "'<image>' has id 256, the model's embedding has 256 rows" in str(caught.value)
        with pytest.raises(UsageError, match="'<image>' has id 256"):
            model.chat([{"role": "user", "content": "<image>"}])
        for odd in (-1, 10**9):
            with pytest.raises(UsageError, match=rf"there is a token id {odd}, the model's"):
                model.generate([5, odd])
    finally:
        model.tokenizer = before


def test_long_texts_are_refused_in_our_words_alone(
    model: HybridModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' warning of errors to come does not come before."""
    monkeypatch.setattr(model.tokenizer, "model_max_length", 10)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger.parent, "propagate", True)
    model.encode("a" * 20)
    assert "indexing errors" not in caplog.text
    model.tokenizer("a" * 20)
    assert "indexing errors" in caplog.text


def test_nothing_comes_in_by_itself() -> None:
    """Transformers draws from 50 tokens where nobody says how many; here from all."""
    config = GenerationConfig(do_sample=True, temperature=0.7)
    assert text_options(config, {}, 5)["top_k"] == 0
    assert text_options(config, {"top_k": 9}, 5)["top_k"] == 9
    own = GenerationConfig(do_sample=True, top_k=20, top_p=0.9)
    assert "top_k" not in text_options(own, {}, 5)
    assert (
        sampling_told(own, {}) == "drawn, top_k 20*, top_p 0.9* (* as the model's own settings ask)"
    )
    assert sampling_told(own, {"top_k": 0, "top_p": 1.0}) == "drawn"
    assert sampling_told(own, {"do_sample": False}) == "the likeliest"
    assert sampling_told(config, {"temperature": 0.5}) == "drawn, temperature 0.5"


def test_stop_strings_of_the_models_own_settings(tiny_model: Path) -> None:
    """They end a text as if they were asked for, and ids, where transformers looks for them."""
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    text = model.generate("ab", **options)
    stop = text[5]
    model.model.generation_config.stop_strings = [stop]
    try:
        cut = text[: text.index(stop)]
        assert model.generate("ab", **options) == cut
        assert model.generate("ab", generation_config=GenerationConfig(**options)) == cut
        assert model.generate("ab", **options, stop_strings=[]) == text
        ids = model.generate(model.encode("ab"), **options)
        assert model.tokenizer.decode(ids[0]).endswith(stop)
    finally:
        model.model.generation_config.stop_strings = None


def test_a_text_begins_once(tiny_model: Path) -> None:
    """A prompt that begins with the token for the beginning gets no second one."""
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    words = model.tokenizer
    begin = words.encode("a")[0]
    words.bos_token = "a"
    model.tokenizer = lambda text, **_: {"input_ids": [begin, *words(text)["input_ids"]]}
    model.tokenizer.bos_token, model.tokenizer.bos_token_id = "a", begin
    assert model.encode("ab")[0].tolist() == words("ab")["input_ids"]
    assert model.encode("b")[0].tolist() == [begin, *words("b")["input_ids"]]


def test_a_text_that_is_too_long_whatever_its_tokens_are(tiny_model: Path) -> None:
    """It is refused before it is cut into tokens, which takes minutes for some."""
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    model.tokenizer = SimpleNamespace(get_vocab=lambda: {"abcd": 0})
    with pytest.raises(UsageError, match=r"4000000 letters, 1000000 tokens or more, .* is 2048"):
        model.encode("x" * 4_000_000)


def test_sampling_takes_finite_numbers_and_switches_off(capsys: pytest.CaptureFixture[str]) -> None:
    """An infinite temperature or penalty is none; 0 and 1 are what changes nothing."""
    for option in ("--temperature", "--repeat-penalty"):
        assert main(["run", "-p", "x", option, "inf"]) == 2
        assert f"error: {option} is inf" in capsys.readouterr().err
    found = sampling_options(top_k=0, top_p=1.0).options
    assert (found["top_k"], found["top_p"]) == (0, 1.0)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    """As editors of Windows put before a text."""
    file = tmp_path / "prompt.txt"
    file.write_bytes("def f".encode("utf-8-sig"))
    assert read_text(file) == "def f"
