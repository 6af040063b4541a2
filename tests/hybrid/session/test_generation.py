"""What a call of generate makes: one value, and nothing that stays behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.session.generation import Generation
from hybrid.session.generation_stream import GenerationStream, Stopped, pieces_of
from hybrid.session.model import HybridModel
from hybrid.textstream import TextStream

PROMPT = torch.tensor([[1, 2, 3]])


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def _streamed(steps: list[list[int]], **options: Any) -> GenerationStream:
    stream = GenerationStream(**options)
    stream.start(PROMPT)
    stream.put(PROMPT)
    for step in steps:
        stream.put(torch.tensor(step))
    return stream


def test_a_text_has_its_ids_and_its_end() -> None:
    """Text, ids, tokens and why it ended, of a text that reached its limit and one that did not."""
    for limit, ended in ((3, "max_new_tokens"), (4, "end token")):
        text = TextStream(Letters(), PROMPT[0].tolist(), ())
        stream = _streamed([[7], [4], [9]], text=text, limit=limit)
        stream.end()
        made = stream.generation("the result")
        assert made.text == "hej"
        assert made.ids.tolist() == [[7, 4, 9]]
        assert (made.times.prompt_tokens, made.times.new_tokens) == (3, 3)
        assert made.times.ttft_s is not None
        assert made.ended == made.times.ended == ended
        assert made.result == "the result"


def test_a_stop_string_and_an_interrupt_end_it_early() -> None:
    """The ids are there as far as they were seen, the text as far as it is certain."""
    text = TextStream(Letters(), PROMPT[0].tolist(), ("ej",))
    stream = GenerationStream(text=text)
    stream.start(PROMPT)
    stream.put(PROMPT)
    for step in (7, 4):
        stream.put(torch.tensor([step]))
    with pytest.raises(Stopped):
        stream.put(torch.tensor([9]))
    made = stream.generation()
    assert (made.text, made.ids.tolist(), made.ended) == ("h", [[7, 4, 9]], "stop string")
    assert made.result is None
    cut = _streamed([[7]]).generation()
    assert (cut.ids.tolist(), cut.ended) == ([[7]], "interrupted")
    nothing = _streamed([]).generation()
    assert (nothing.ids.shape, nothing.times.ttft_s) == ((1, 0), None)


def test_several_sequences_and_several_tokens_at_once() -> None:
    """A row a sequence; steps of several tokens, as guessed ones; a search's result at once."""
    stream = GenerationStream()
    stream.start(PROMPT.repeat(2, 1))
    stream.put(PROMPT.repeat(2, 1))
    for step in ([1, 2], [3, 4]):
        stream.put(torch.tensor(step))
    assert stream.generation().ids.tolist() == [[1, 3], [2, 4]]
    assert _streamed([[5], [[6, 7]]]).generation().ids.tolist() == [[5, 6, 7]]
    searched = GenerationStream()
    searched.start(PROMPT)
    searched.take(torch.cat((PROMPT, torch.tensor([[8, 9]])), dim=1))
    made = searched.generation()
    assert made.ids.tolist() == [[8, 9]]
    assert (made.times.new_tokens, made.times.ttft_s) == (2, None)


def test_a_call_leaves_one_value_on_the_model(tiny_model: Path) -> None:
    """Its ids are those that transformers returns; nothing else of the session has changed."""
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    before = dict(vars(model))
    ids = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    changed = {name for name, value in vars(model).items() if value is not before[name]}
    assert changed == {"_last"}
    made = model._last
    assert isinstance(made, Generation)
    assert torch.equal(made.ids, ids[:, PROMPT.shape[1] :])
    assert made.result is None
    assert model.report().figures["new_tokens"].value == 5
    text = model.generate("def f", max_new_tokens=5, do_sample=False)
    assert (made.times.new_tokens, model._last.text) == (5, text)
    assert model._last.times.extras == ("text",)


def test_a_result_is_gone_when_the_caller_drops_it(tiny_model: Path) -> None:
    """It may hold a cache of gigabytes, which the session has no use for."""
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True}
    kept = weakref.ref(model.generate(PROMPT, **options))
    gc.collect()
    assert kept() is None
    assert model.report().figures["new_tokens"].value == 3


def test_pieces_come_from_a_thread_that_can_be_stopped() -> None:
    """Each piece as it is written; an error comes through; who leaves early stops the writer."""
    assert list(pieces_of(lambda tell: [tell(piece) for piece in "abc"])) == ["a", "b", "c"]

    def broken(tell: Any) -> None:
        tell("a")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(pieces_of(broken))
    ended = []

    def endless(tell: Any) -> None:
        try:
            while True:
                tell("a")
        except Stopped:
            ended.append(True)
            raise

    pieces = pieces_of(endless)
    assert next(pieces) == "a"
    pieces.close()
    assert ended == [True]
