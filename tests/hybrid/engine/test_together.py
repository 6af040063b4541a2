"""Texts that are written at once: each as alone, whatever joins and leaves beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid.engine.together
from cpu_experts.decoder.pages import PAGE
from drafts import Foretold
from hybrid.engine.errors import NotANumberError, TooLongError
from hybrid.engine.together import Together
from hybrid.session.generation_stream import Stopped
from hybrid.session.model import HybridModel
from together_texts import GREEDY, SIZE, Text, alone, finish, prompt

DRAWN = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> HybridModel:
    """A model without an end token: it writes as much as it is asked to."""
    return HybridModel.from_pretrained(tiny_model, threads=1, dtype="float32", speculate="off")


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_texts_of_different_lengths_are_as_alone(
    tiny: HybridModel, options: dict[str, Any]
) -> None:
    """Greedy and drawn with a seed, prompts of one piece and of several, joining in the middle."""
    together = Together(tiny, 4, SIZE)
    assert together.refused is None
    lengths = ((5, 30), (70, 12), (700, 20), (PAGE, 25), (33, 9), (2, 40))
    wanted = [
        alone(tiny, prompt(seed, length, tiny), most, seed, **options)
        for seed, (length, most) in enumerate(lengths)
    ]
    texts: list[Text] = []
    for seed, (length, most) in enumerate(lengths):
        while len(together.running) == 4:
            together.round()
        texts.append(Text(together, tiny, prompt(seed, length, tiny), most, seed, **options))
        together.round()
    finish(together, texts)
    assert [text.error for text in texts] == [None] * len(texts)
    assert [text.ids for text in texts] == wanted


def test_prompts_are_read_in_pieces_while_others_write(
    tiny: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that writes gets a token in every round, and prompts take turns."""
    monkeypatch.setattr(Together, "_piece_tokens", lambda self: 64)
    together = Together(tiny, 3, SIZE)
    writes = Text(together, tiny, prompt(0, 10, tiny), 60, **GREEDY)
    together.round()
    prompts = [Text(together, tiny, prompt(at, 400, tiny), 2, **GREEDY) for at in (1, 2)]
    before = writes.generation.times.new_tokens
    for rounds in range(1, 7):
        together.round()
        assert writes.generation.times.new_tokens == before + rounds
        assert not any(text.ended for text in prompts)
    computed = [text.computed for text in together.running[1:]]
    assert computed == [192, 192]
    finish(together, [writes, *prompts])


def test_who_leaves_ends_within_a_round(tiny: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its prompt and among its tokens; the others are as alone, and the memory is free."""
    monkeypatch.setattr(Together, "_piece_tokens", lambda self: 64)
    together = Together(tiny, 4, SIZE)
    wanted = alone(tiny, prompt(9, 40, tiny), 30, **GREEDY)
    stays = Text(together, tiny, prompt(9, 40, tiny), 30, **GREEDY)
    long = Text(together, tiny, prompt(1, 900, tiny), 30, **GREEDY)
    writes = Text(together, tiny, prompt(2, 5, tiny), 30, **GREEDY)
    for _ in range(3):
        together.round()
    long.left = writes.left = True
    together.round()
    assert long.ended
    assert writes.ended
    assert writes.generation.ended == "interrupted"
    assert long.generation.times.new_tokens == 0
    finish(together, [stays])
    assert stays.ids == wanted


def test_no_room_sets_the_last_text_aside(tiny: HybridModel) -> None:
    """It goes on when another has ended, with the tokens that it would have had."""
    size = _page_bytes(tiny)
    together = Together(tiny, 4, 12 * size)
    cases = [(seed, 60 + 20 * seed, 170) for seed in range(4)]
    wanted = [alone(tiny, prompt(s, n, tiny), most, s, **DRAWN) for s, n, most in cases]
    texts = [Text(together, tiny, prompt(s, n, tiny), most, s, **DRAWN) for s, n, most in cases]
    aside = 0
    for _ in range(2000):
        if all(text.ended for text in texts):
            break
        together.round()
        together.check_integrity()
        aside += any(text.aside for text in together.running)
        assert together.running == [] or not together.running[0].aside
    assert aside > 20
    assert [text.ids for text in texts] == wanted


def _page_bytes(model: HybridModel) -> int:
    fast = model.model.hybrid_fast.decoder
    return int(fast.decoder.new_pages(1 << 26, 1).page_bytes)


def test_a_prompt_beyond_the_memory_is_refused(tiny: HybridModel) -> None:
    """With both numbers; one that just fits is cut off where the memory ends."""
    together = Together(tiny, 2, 5 * _page_bytes(tiny))
    assert together.room == 4 * PAGE
    writing = tiny.writing(torch.tensor([prompt(0, together.room, tiny)]), max_new_tokens=5)
    with pytest.raises(TooLongError, match="has 256 tokens and the cache of all texts holds 256"):
        together.admit(writing, None, lambda: None, lambda error: None)
    text = Text(together, tiny, prompt(0, together.room - 9, tiny), 50, **GREEDY)
    finish(together, [text])
    assert text.generation.times.new_tokens == 9
    assert text.generation.ended == "context full"


def test_what_is_no_number_ends_one_text(
    tiny: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is told; the others are as alone, and nobody goes on from it."""
    together = Together(tiny, 2, SIZE)
    wanted = alone(tiny, prompt(0, 40, tiny), 20, **GREEDY)
    good = Text(together, tiny, prompt(0, 40, tiny), 20, **GREEDY)
    bad = Text(together, tiny, prompt(1, 40, tiny), 20, **GREEDY)
    for _ in range(5):
        together.round()
    assert together._memory is not None
    many = together._memory.many
    real = many.step

    def spoilt(given: Any) -> Any:
        rows = real(given).clone()
        rows[1] = torch.nan
        return rows

    monkeypatch.setattr(many, "step", spoilt)
    together.round()
    monkeypatch.undo()
    assert isinstance(bad.error, NotANumberError)
    assert "is not a number (NaN)" in str(bad.error)
    finish(together, [good])
    assert good.ids == wanted


def test_an_error_ends_those_that_it_concerns(
    tiny: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of the step, not those that come after; no page is lost."""
    together = Together(tiny, 4, SIZE)
    texts = [Text(together, tiny, prompt(at, 8, tiny), 20, **GREEDY) for at in range(3)]
    together.round()
    with monkeypatch.context() as patch:
        patch.setattr(hybrid.fast.many.ManySequences, "step", _broken)
        together.round()
    assert [type(text.error) for text in texts] == [RuntimeError] * 3
    together.check_integrity()
    wanted = alone(tiny, prompt(0, 8, tiny), 20, **GREEDY)
    again = Text(together, tiny, prompt(0, 8, tiny), 20, **GREEDY)
    finish(together, [again])
    assert again.ids == wanted


def _broken(*_: Any) -> Any:
    raise RuntimeError("broken")


def test_the_next_turn_goes_on_from_the_last(tiny: HybridModel) -> None:
    """Its prompt and answer are computed already, to the token; the text is as from scratch."""
    together = Together(tiny, 2, SIZE)
    first = Text(together, tiny, prompt(0, 150, tiny), 30, **GREEDY)
    finish(together, [first])
    ids = [*prompt(0, 150, tiny), *first.ids, *prompt(1, 25, tiny)]
    wanted = alone(tiny, ids, 20, **GREEDY)
    second = Text(together, tiny, ids, 20, **GREEDY)
    finish(together, [second])
    assert second.generation.times.kept_tokens == 150 + 29  # the last token was not computed
    assert second.ids == wanted
    other = [*ids[:100], *prompt(2, 40, tiny)]
    wanted = alone(tiny, other, 20, **GREEDY)
    third = Text(together, tiny, other, 20, **GREEDY)
    finish(together, [third])
    assert third.generation.times.kept_tokens == 100
    assert third.ids == wanted


def test_equal_prompts_are_computed_once(tiny: HybridModel) -> None:
    """Those that came later wait for the first one's pages, and are drawn by their own seeds."""
    together = Together(tiny, 4, SIZE)
    ids = prompt(0, 3 * PAGE + 5, tiny)
    wanted = [alone(tiny, ids, 10, seed, **DRAWN) for seed in range(3)]
    texts = [Text(together, tiny, ids, 10, seed, **DRAWN) for seed in range(3)]
    finish(together, texts)
    assert [text.generation.times.kept_tokens for text in texts] == [0, 3 * PAGE, 3 * PAGE]
    assert [text.ids for text in texts] == wanted


def test_what_was_used_last_is_remembered(tiny: HybridModel) -> None:
    """Within the memory; what is forgotten is computed again."""
    together = Together(tiny, 1, 9 * _page_bytes(tiny))

    def kept(seed: int) -> int:
        text = Text(together, tiny, prompt(seed, 2 * PAGE + 1, tiny), 2, **GREEDY)
        finish(together, [text])
        return text.generation.times.kept_tokens

    assert [kept(0), kept(1)] == [0, 0]
    for other in range(2, 9):
        assert kept(0) == 2 * PAGE
        assert kept(other) == 0
    assert kept(1) == 0


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_drafts_change_no_text(tiny: HybridModel, options: dict[str, Any]) -> None:
    """Right and wrong ones; one text alone is drafted for, until another joins it."""
    together = Together(tiny, 2, SIZE)
    ids = prompt(0, 100, tiny)
    wanted = alone(tiny, ids, 60, 3, **options)
    other = alone(tiny, prompt(1, 9, tiny), 90, 3, **options)
    first = Text(together, tiny, ids, 60, 3, **options)
    known = [*ids, *wanted]
    drafts = Foretold(known, 4, {len(ids) + at for at in (6, 7, 20)}).begin_after(ids)
    together.running[0].drafts = drafts
    for _ in range(12):
        together.round()
        together.check_integrity()
    assert len(drafts.sizes) > 8
    assert first.generation.times.new_tokens > 20
    steps = len(drafts.sizes)
    beside = Text(together, tiny, prompt(1, 9, tiny), 90, 3, **options)
    together.round()
    assert len(drafts.sizes) == steps
    finish(together, [first, beside])
    assert first.ids == wanted
    assert beside.ids == other


@pytest.mark.parametrize("taken", [2, 3, 4, 7])
def test_a_text_that_is_left_in_a_draft_is_remembered(tiny: HybridModel, taken: int) -> None:
    """As far as it was seen, and no further."""
    together = Together(tiny, 1, SIZE)
    ids = prompt(0, 100, tiny)
    known = [*ids, *alone(tiny, ids, 40, **GREEDY)]
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(text.generation.ids[0]) == taken:
            raise Stopped

    text = Text(together, tiny, ids, 40, on_text=on_text, **GREEDY)
    together.running[0].drafts = Foretold(known, 6).begin_after(ids)
    while not text.ended:
        together.round()
    together.check_integrity()
    found = text.ids
    assert found == known[100 : 100 + len(found)]
    more = [*ids, *found, *prompt(1, 5, tiny)]
    again = Text(together, tiny, more, 9, **GREEDY)
    finish(together, [again])
    assert again.generation.times.kept_tokens == 100 + len(found) - 1
    assert again.ids == alone(tiny, more, 9, **GREEDY)


def test_drafts_are_asked_of_the_model(tiny_model: Path) -> None:
    """As many as the user wants, and told of in the end."""
    model = HybridModel.from_pretrained(tiny_model, threads=1, speculate=4)
    together = Together(model, 1, SIZE)
    text = Text(together, model, prompt(0, 9, model), 5, **GREEDY)
    finish(together, [text])
    told = text.generation.times.speculated
    assert told is not None
    assert told.asked == "lookup of 4"


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_of_many_that_come_and_go(tiny: HybridModel, seed: int) -> None:
    """Hundreds of texts that share beginnings, leave anywhere, and find little room."""
    choose = random.Random(seed)
    together = Together(tiny, 4, 14 * _page_bytes(tiny))
    cases = [(choose.choice((3, 40, 100, 180)), choose.randrange(3)) for _ in range(6)]
    wanted = {
        case: alone(tiny, prompt(case[1], case[0], tiny), 24, case[1], **DRAWN) for case in cases
    }
    texts: list[tuple[Text, tuple[int, int]]] = []
    for _ in range(100):
        while len(together.running) == 4:
            together.round()
            for text, _ in texts[-6:]:
                text.left |= choose.random() < 0.01
        case = choose.choice(cases)
        ids = prompt(case[1], case[0], tiny)
        texts.append((Text(together, tiny, ids, 24, case[1], **DRAWN), case))
        if choose.random() < 0.5:
            together.round()
            together.check_integrity()
    finish(together, [text for text, _ in texts])
    assert together.running == []
    assert sum(text.left for text, _ in texts) > 3
    for text, case in texts:
        assert text.error is None
        found = text.ids
        assert found == wanted[case][: len(found)]
        assert text.left or len(found) == 24


def test_a_model_that_steps_cannot_take_together_is_told(tiny: HybridModel) -> None:
    """While somebody's code waits for single steps, texts go alone."""
    together = Together(tiny, 2, SIZE)
    writing = tiny.writing(torch.tensor([[5, 6]]), max_new_tokens=5)
    hook = tiny.model.lm_head.register_forward_hook(lambda *_: None)
    try:
        assert not together.admit(writing, None, lambda: None, lambda error: None)
        assert together.refused == "hooks"
    finally:
        hook.remove()
    assert together.admit(writing, None, lambda: None, lambda error: None)
