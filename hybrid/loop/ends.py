"""What ends a generation: a length, a token, a time, a stop string."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)


class Ends:
    """Tells after each token of one sequence whether it was the last.

    Make one with :meth:`of`, from what transformers has prepared.

    Attributes
    ----------
    longest
        Tokens, the prompt's included, that there are at most; None without a limit.
    """

    def __init__(self) -> None:
        self.longest: int | None = None
        self._tokens: set[int] = set()
        self._until_s: float | None = None
        self._strings: list[StopStringCriteria] = []
        self._warns: list[MaxLengthCriteria] = []

    @classmethod
    def of(cls, criteria: Iterable[Any]) -> Self | None:
        """Return what transformers' ``criteria`` ask for; None when one of them is a caller's."""
        ends = cls()
        for criterion in criteria:
            kind = type(criterion)
            if kind is MaxLengthCriteria:
                limits = (ends.longest, criterion.max_length)
                ends.longest = min(limit for limit in limits if limit is not None)
                if criterion.max_position_embeddings is not None:
                    ends._warns.append(criterion)
            elif kind is MaxTimeCriteria:
                until_s = criterion.initial_timestamp + criterion.max_time
                ends._until_s = until_s if ends._until_s is None else min(ends._until_s, until_s)
            elif kind is EosTokenCriteria:
                ends._tokens.update(criterion.eos_token_id.flatten().tolist())
            elif kind is StopStringCriteria:
                ends._strings.append(criterion)
            else:
                return None
        return ends

    def met(self, token: int, length: int, ids: Tensor) -> bool:
        """Whether ``token`` ends a sequence: the last of ``length`` with which ``ids`` begin.

        ``ids`` are ``[1, T]`` and may go on behind it.
        """
        if token in self._tokens or (self.longest is not None and length >= self.longest):
            return True
        if self._until_s is not None and time.time() > self._until_s:
            return True
        for warns in self._warns:
            if length > (warns.max_position_embeddings or 0):
                warns(ids[:, :length], None)  # it has a word to say about that
        return any(bool(string(ids[:, :length], None)) for string in self._strings)
