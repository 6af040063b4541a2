"""Guides of tokens: told of each one once, heard before each one, by both loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid.loop.choice import Choice, knows
from hybrid.loop.guided import GuidedLogits


class _Counting:
    """Allows one token, the next one each time."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self, row: Tensor) -> None:
        only = row[len(self.taken)].clone()
        row.fill_(-torch.inf)
        row[len(self.taken)] = only

    def take(self, token: int) -> None:
        self.taken.append(token)


def test_a_choice_asks_its_guides() -> None:
    """Before each token, and tells them which it was; the logits stay as they are."""
    guide = _Counting()
    processors = [GuidedLogits(2, [guide])]
    assert knows(processors)
    choice = Choice(processors, False, [7, 8], 10)
    logits = torch.arange(10.0)
    assert [choice.choose(logits) for _ in range(4)] == [0, 1, 2, 3]
    assert guide.taken == [0, 1, 2, 3]
    assert logits.tolist() == list(range(10))


def test_transformers_loop_asks_them_the_same() -> None:
    """Several tokens may have come meanwhile, and the prompt is none of them."""
    guide = _Counting()
    processor = GuidedLogits(2, [guide])
    scores = torch.arange(10.0)[None]
    assert processor(torch.tensor([[7, 8]]), scores).argmax() == 0
    assert processor(torch.tensor([[7, 8, 0, 1, 2]]), scores).argmax() == 3
    assert guide.taken == [0, 1, 2]
    assert scores[0].tolist() == list(range(10))
    with pytest.raises(ValueError, match="one sequence, 2"):
        processor(torch.zeros(2, 3, dtype=torch.long), scores)
