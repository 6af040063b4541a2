"""Penalties of tokens that were generated already, which transformers does not have."""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessor


class OccurrencePenalties(LogitsProcessor):
    """Lowers the logits of tokens that were generated before, as OpenAI's API has it.

    Parameters
    ----------
    prompt_tokens
        Tokens of the prompt, which do not count.
    presence
        What a token loses that was generated at least once.
    frequency
        What it loses for each time that it was.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` ``[B, V]`` after what was generated of ``input_ids`` ``[B, T]``."""
        for row, ids in enumerate(input_ids):
            tokens, counts = ids[self.prompt_tokens :].unique(return_counts=True)
            scores[row, tokens] -= self.presence + self.frequency * counts
        return scores
