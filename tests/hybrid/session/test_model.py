"""HybridModel: what it writes, and which calls it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import hybrid
from hybrid.errors import UsageError
from hybrid.session.generation_options import DEFAULT_NEW_TOKENS
from hybrid.session.model import HybridModel
from tiny_model import CONTEXT, TEMPLATE

GREEDY = {"do_sample": False}


@pytest.fixture
def chat_model(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> HybridModel:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def from_transformers(model: HybridModel, prompt: str, **options: Any) -> str:
    """What transformers' own generate and decode make of ``prompt``."""
    inputs = model.tokenizer(prompt, return_tensors="pt")
    out = model.model.generate(**inputs, **GREEDY | options)
    return str(model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


def test_text_is_what_transformers_generates(model: HybridModel) -> None:
    """Text in, text out: the same as encoding, transformers' generate, decoding."""
    assert model.generate("def f", max_new_tokens=30, **GREEDY) == from_transformers(
        model, "def f", max_new_tokens=30
    )


def test_text_takes_an_attention_mask(model: HybridModel) -> None:
    """What tokenizers return beside the ids can be handed on."""
    mask = torch.ones(1, 5, dtype=torch.long)
    assert model.generate("def f", max_new_tokens=9, attention_mask=mask, **GREEDY) == (
        model.generate("def f", max_new_tokens=9, **GREEDY)
    )


def test_ids_give_what_transformers_gives(model: HybridModel) -> None:
    """Token ids pass through to transformers and its result comes back as it is."""
    ids = model.encode("abc")
    expected = model.model.generate(ids, max_new_tokens=5, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=5, **GREEDY), expected)
    assert torch.equal(model.generate(ids[0].tolist(), max_new_tokens=5, **GREEDY), expected)
    rich = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(rich.sequences, expected)


def test_pieces_join_to_the_text(model: HybridModel) -> None:
    """stream() and on_text tell the text of generate() in more than one piece."""
    whole = model.generate("x", max_new_tokens=40, **GREEDY)
    told: list[str] = []
    model.generate("x", max_new_tokens=40, on_text=told.append, **GREEDY)
    assert "".join(told) == whole
    assert list(model.stream("x", max_new_tokens=40, **GREEDY)) == told
    assert list(model.stream(model.encode("x")[0].tolist(), max_new_tokens=40, **GREEDY)) == told
    assert len(told) > 1


def test_sampling_repeats_with_the_seed(model: HybridModel) -> None:
    """torch's seed decides what is sampled."""
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate("a", max_new_tokens=20, do_sample=True))
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_before_a_stop_string(model: HybridModel) -> None:
    """A text result leaves the stop string out and generation really ends there."""
    torch.manual_seed(3)
    whole = model.generate("a", max_new_tokens=60, do_sample=True)
    stop = next(char for char in whole[5:] if char.isascii())
    torch.manual_seed(3)
    cut = model.generate("a", max_new_tokens=60, do_sample=True, stop_strings=[stop, "\0\0"])
    assert cut == whole[: whole.index(stop)]
    figures = model.report().figures
    assert "stop string" in figures["new_tokens"].source
    assert figures["new_tokens"].value < 60


def test_ids_keep_transformers_meaning_of_stop_strings(model: HybridModel) -> None:
    """With ids the stop string stays in the result; the tokenizer is given for the caller."""
    ids = model.encode("a")
    text = model.generate("a", max_new_tokens=30, **GREEDY)
    stop = next(char for char in text if char.isascii())
    out = model.generate(ids, max_new_tokens=30, stop_strings=stop, **GREEDY)
    assert model.tokenizer.decode(out[0, 1:]) == text[: text.index(stop) + 1]


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_is_told_everything(model: HybridModel) -> None:
    """transformers' streamers work: the prompt first, every id once, one end."""
    ids = model.encode("ab")
    for prompt in ("ab", ids):
        recorder = _Recorder()
        model.generate(prompt, max_new_tokens=6, streamer=recorder, **GREEDY)
        assert recorder.ids == model.generate(ids, max_new_tokens=6, **GREEDY)[0].tolist()
        assert recorder.ended == 1


def test_beam_search_gives_text_but_does_not_stream(model: HybridModel) -> None:
    """Beams end in transformers' text; asking for pieces of it is an error that says why."""
    text = model.generate("ab", max_new_tokens=8, num_beams=3, **GREEDY)
    assert text == from_transformers(model, "ab", max_new_tokens=8, num_beams=3)
    figures = model.report().figures
    assert figures["new_tokens"].value == 8
    assert figures["ttft_s"].value is None
    with pytest.raises(UsageError, match="beam search"):
        model.generate("ab", max_new_tokens=8, num_beams=3, on_text=print)


def test_prompt_lookup_streams_accepted_tokens_only(model: HybridModel) -> None:
    """With assisted decoding, several tokens a step, the text is still the greedy one."""
    told: list[str] = []
    text = model.generate(
        "ababab", max_new_tokens=24, prompt_lookup_num_tokens=3, on_text=told.append, **GREEDY
    )
    assert text == "".join(told) == model.generate("ababab", max_new_tokens=24, **GREEDY)


def test_a_generation_config_is_used_and_left_alone(model: HybridModel) -> None:
    """Limits come from the config given; the caller's object does not change."""
    config = GenerationConfig(max_new_tokens=7, do_sample=False)
    before = config.to_dict()
    model.generate("a", generation_config=config)
    assert model.report().figures["new_tokens"].value == 7
    assert config.to_dict() == before
    model.generate("abc", max_length=9, **GREEDY)
    assert model.report().figures["new_tokens"].value == 6


def test_text_has_a_default_length(model: HybridModel) -> None:
    """Without any limit a text gets the documented number of tokens, not transformers' 20."""
    model.generate("a", **GREEDY)
    figures = model.report().figures
    assert figures["new_tokens"].value == DEFAULT_NEW_TOKENS
    assert "max_new_tokens" in figures["new_tokens"].source


def test_prompts_that_cannot_be_continued(model: HybridModel) -> None:
    """No tokens, or no room: an error naming the numbers, before anything runs."""
    for call in (model.generate, model.stream):
        with pytest.raises(UsageError, match="0 tokens"):
            call("")
        with pytest.raises(UsageError, match=rf"{CONTEXT + 1} tokens .* {CONTEXT}\b"):
            call("x" * (CONTEXT + 1))
        with pytest.raises(UsageError, match=str(CONTEXT)):
            call("x" * CONTEXT)
    with pytest.raises(UsageError, match="0 tokens"):
        model.generate([])


def test_text_ends_where_the_context_does(model: HybridModel) -> None:
    """More new tokens than fit: the text ends at the context and the report says so."""
    model.generate("x" * (CONTEXT - 5), max_new_tokens=50, **GREEDY)
    figure = model.report().figures["new_tokens"]
    assert figure.value == 5
    assert "context full" in figure.source


def test_options_that_no_text_can_satisfy(model: HybridModel) -> None:
    """Several sequences and an empty stop string are refused by name."""
    with pytest.raises(UsageError, match="one sequence, 2 are"):
        model.generate("a", num_return_sequences=2, do_sample=True)
    with pytest.raises(UsageError, match="one sequence, 3 are"):
        list(model.stream(torch.ones(3, 2, dtype=torch.long)))
    for prompts in (["a", "b"], [[1, 2], [3]], {"a": 1}):
        with pytest.raises(UsageError, match="token ids"):
            model.generate(prompts)
    for limit, wanted in (({"max_new_tokens": 0}, "0"), ({"max_length": 1}, "-2")):
        with pytest.raises(UsageError, match=f"^{wanted} new tokens .* prompt of 3"):
            model.generate("abc", **limit)
    for ids in (5, torch.ones(1, 1, 3)):
        with pytest.raises(UsageError, match=r"they must be \[T\] or \[B, T\]"):
            model.generate(ids)
    with pytest.raises(UsageError, match="stop string"):
        model.generate("a", stop_strings=[""])


def test_chat_continues_the_rendered_template(chat_model: HybridModel) -> None:
    """chat() is generate() over the messages as the template writes them."""
    messages = [{"role": "user", "content": "hi"}]
    answer = chat_model.chat(messages, max_new_tokens=12, **GREEDY)
    assert answer == chat_model.generate("[user]hi\n[assistant]", max_new_tokens=12, **GREEDY)


def test_chat_needs_a_template(model: HybridModel) -> None:
    """A model that was not trained to chat says so instead of inventing a format."""
    with pytest.raises(UsageError, match="no chat template") as caught:
        model.chat([{"role": "user", "content": "hi"}])
    assert caught.value.hint


def test_leaving_a_stream_stops_the_model(model: HybridModel) -> None:
    """After a break the worker is gone and the model answers again."""
    for _ in model.stream("a", max_new_tokens=CONTEXT, **GREEDY):
        break
    assert not [t for t in threading.enumerate() if t.name == "hybrid-generate"]
    figures = model.report().figures
    assert "interrupted" in figures["new_tokens"].source
    assert figures["new_tokens"].value < CONTEXT - 1
    assert model.generate("a", max_new_tokens=3, **GREEDY)


def test_an_error_in_a_callback_reaches_the_caller(model: HybridModel) -> None:
    """A reader that fails ends generation with its own error."""

    def fail(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        model.generate("a", max_new_tokens=5, on_text=fail, **GREEDY)
    assert model.generate("a", max_new_tokens=3, **GREEDY)


def test_an_error_in_the_worker_reaches_the_reader(model: HybridModel) -> None:
    """stream() raises in the reader's thread what generate would have raised."""
    with pytest.raises(UsageError, match="stop string"):
        list(model.stream("a", stop_strings=""))


def test_the_package_offers_the_class() -> None:
    """``hybrid.HybridModel`` is this class, imported on first use."""
    assert hybrid.HybridModel is HybridModel


def test_a_prompts_progress_is_told(model: HybridModel) -> None:
    """``on_prompt`` hears of every piece of a prompt, whose end is the last."""
    heard: list[tuple[int, int]] = []
    model.generate(
        "x" * 1200,
        max_new_tokens=2,
        on_prompt=lambda at: heard.append((at.done, at.total)),
        **GREEDY,
    )
    assert heard == [(512, 1200), (1024, 1200), (1200, 1200)]


def test_generating_from_a_callback_is_refused(model: HybridModel) -> None:
    """A call that would wait for itself raises; the model goes on afterwards."""

    def again(_: str) -> None:
        model.generate("x", max_new_tokens=1)

    with pytest.raises(UsageError, match="callback of its own generate"):
        model.generate("ab", max_new_tokens=4, on_text=again)
    assert model.generate("ab", max_new_tokens=2) is not None


def test_no_copies_of_what_lies_on_a_device(tiny_model: Path) -> None:
    """Said so in words; the model goes on."""
    model = HybridModel.from_pretrained(
        tiny_model, experts="f32", device="emulated", vram="700MiB", threads=1, dtype="float32"
    )
    wanted = model.generate("ab", max_new_tokens=3, do_sample=False)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="can neither be copied nor pickled") as caught:
            copied(model)
        assert "vram=0" in str(caught.value.hint)
    assert model.generate("ab", max_new_tokens=3, do_sample=False) == wanted


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_generate_by_themselves(model: HybridModel, how: str) -> None:
    """The same text, and nothing reported that the original did."""
    wanted = model.generate("ab", max_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.generate("ab", max_new_tokens=3, do_sample=False) == wanted
