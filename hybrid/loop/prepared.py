"""Has transformers prepare a call of ``generate``, for who then runs the steps himself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.loop.choice import Choice
from hybrid.loop.ends import Ends
from hybrid.loop.loop import ends_of_ours


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a call of ``generate`` comes to.

    Attributes
    ----------
    ids
        The prompt.
    ends
        What ends it.
    """

    ids: list[int]
    ends: Ends
    _processors: list[Any]
    _draws: bool

    def choice(self, vocabulary: int, generator: torch.Generator | None = None) -> Choice:
        """Return what chooses its tokens of so many logits, drawn from a generator's numbers."""
        return Choice(self._processors, self._draws, self.ids, vocabulary, generator)


class Preparing:
    """Stands for a loop, as ``custom_generate`` of ``generate``, and computes nothing.

    Attributes
    ----------
    found
        The call that it was given; None where :class:`~hybrid.loop.loop.Loop` would have left it to
        transformers' loop.
    """

    def __init__(self) -> None:
        self.found: Prepared | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Iterable[Any],
        stopping_criteria: Iterable[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Take a call, and return its prompt."""
        processors = list(logits_processor)
        ends = ends_of_ours(
            model, input_ids, processors, stopping_criteria, generation_config, model_kwargs
        )
        if ends is not None:
            ids, draws = input_ids[0].tolist(), bool(generation_config.do_sample)
            self.found = Prepared(ids, ends, processors, draws)
        return input_ids
