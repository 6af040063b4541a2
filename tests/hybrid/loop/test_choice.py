"""Choosing a token by logits, beside transformers' processors of logits, also of many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrid.loop.choice import Choice, knows
from hybrid.loop.penalties import OccurrencePenalties

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5000]


def _prompt(vocabulary: int) -> list[int]:
    return [token for token in PROMPT if token < vocabulary]


def _processors(vocabulary: int) -> dict[str, list[Any]]:
    tokens = len(_prompt(vocabulary))
    ends = torch.tensor([1, 7, 70000])
    return {
        "none": [],
        "temperature": [TemperatureLogitsWarper(0.6)],
        "top-k": [TopKLogitsWarper(7)],
        "top-p": [TopPLogitsWarper(0.8)],
        "top-p of many": [TemperatureLogitsWarper(50.0), TopPLogitsWarper(0.9)],
        "top-p of one": [TopPLogitsWarper(0.0)],
        "top-p that keeps some": [TopPLogitsWarper(0.1, min_tokens_to_keep=5)],
        "top-p of few": [TopKLogitsWarper(3), TopPLogitsWarper(0.95)],
        "min-p": [MinPLogitsWarper(0.3)],
        "all": [
            RepetitionPenaltyLogitsProcessor(1.3),
            OccurrencePenalties(tokens, 0.7, 0.4),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
        ],
        "too short": [MinLengthLogitsProcessor(14, ends[ends < vocabulary])],
        "too few": [MinNewTokensLengthLogitsProcessor(tokens, 5, ends[ends < vocabulary])],
    }


@pytest.mark.parametrize("vocabulary", [50, 9000])
@pytest.mark.parametrize("draws", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("name", _processors(50))
def test_the_same_tokens(name: str, draws: bool, vocabulary: int) -> None:
    """Thirty tokens one after the other, and the same numbers left of the random ones."""
    prompt = _prompt(vocabulary)
    processors = LogitsProcessorList(_processors(vocabulary)[name])
    torch.manual_seed(5)
    rows = torch.randn(30, vocabulary) * 4
    rows[:, 1] += 8  # an end that is wanted
    ids, wanted = torch.tensor([prompt]), []
    for row in rows:
        scores = processors(ids, row[None].clone())
        token = torch.multinomial(scores.softmax(-1), 1) if draws else scores.argmax(-1)[None]
        wanted.append(int(token))
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.randn(30, vocabulary)
    choice = Choice(processors, draws, prompt, vocabulary)
    before = rows.clone()
    assert [choice.choose(row) for row in rows] == wanted
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(rows, before)


def test_logits_of_half_precision() -> None:
    """As transformers reads them: in float32, the first of equal ones."""
    row = torch.tensor([0.1, 2.0001, 2.0002, 2.0], dtype=torch.bfloat16)
    assert Choice([], False, [], 4).choose(row) == 1


def test_what_is_known() -> None:
    """Processors of these kinds with the settings that generate gives them, and no others."""
    for processors in _processors(50).values():
        assert knows(processors)

    class Own(TopKLogitsWarper):
        pass

    for unknown in (
        NoRepeatNGramLogitsProcessor(2),
        Own(3),
        TopKLogitsWarper(3, filter_value=-1.0),
        RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=2),
    ):
        assert not knows([TemperatureLogitsWarper(0.5), unknown])
