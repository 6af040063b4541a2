"""What one call of ``generate`` made: text, ids, times, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid.ledger.metrics import GenerationTimes

DRAWN = "drawn"
"""How it begins to say that tokens were drawn, and not the likeliest ones taken."""


@dataclass(frozen=True, eq=False)
class Generation:
    """One call of ``generate``.

    Attributes
    ----------
    text
        The new text, without the prompt and without the stop string; empty where ids were asked
        for.
    ids
        The new tokens, ``[B, T]``, as far as they were seen: with a stop string's.
    times
        How many tokens there were, how long they took, and why they ended.
    chosen
        How its tokens were chosen, in words.
    result
        What transformers' ``generate`` returned; None where it was left early.
    """

    text: str
    ids: Tensor
    times: GenerationTimes
    chosen: str
    result: Any

    @property
    def ended(self) -> str:
        """Why it ended, see :class:`GenerationTimes`."""
        return self.times.ended
