"""Lets guides say which tokens may follow: a grammar, a thinking budget, or one who looks on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import LogitsProcessor


class Guide(Protocol):
    """Follows one sequence token by token."""

    def mask(self, row: Tensor) -> None:
        """Change the logits ``[V]`` of the next token in place."""

    def take(self, token: int) -> None:
        """Go on by a token that was chosen."""


class GuidedLogits(LogitsProcessor):
    """Lets guides change the logits of one sequence, in their order.

    Penalties come before it, temperature and what leaves tokens out come after it.

    Parameters
    ----------
    prompt_tokens
        Tokens of the prompt, which no guide is told of.
    guides
        Each of this sequence alone.
    """

    def __init__(self, prompt_tokens: int, guides: Sequence[Guide]) -> None:
        self.guides = tuple(guides)
        self._told = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` ``[1, V]`` as the guides have them after ``input_ids`` ``[1, T]``.

        Raises
        ------
        ValueError
            For more sequences than one.
        """
        if len(input_ids) != 1:
            raise ValueError(f"guides follow one sequence, {len(input_ids)} are given")
        for token in input_ids[0, self._told :].tolist():
            for guide in self.guides:
                guide.take(token)
        self._told = input_ids.shape[1]
        scores = scores.clone()
        for guide in self.guides:
            guide.mask(scores[0])
        return scores
