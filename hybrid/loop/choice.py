"""Chooses the next token from logits, as transformers' processors of logits would have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrid.loop.guided import GuidedLogits
from hybrid.loop.penalties import OccurrencePenalties

_NEVER = -torch.inf
#: Tokens among which a share of the probability is looked for first.
_LIKELIEST = 256
_ROUNDING = 1e-4


def knows(processors: Iterable[Any]) -> bool:
    """Whether a :class:`Choice` can be made of transformers' ``processors``."""
    return all(type(each) in _STEPS and _ordinary(each) for each in processors)


class _Step(Protocol):
    """Changes logits ``[V]`` in place; is told of each token that is chosen."""

    def __call__(self, row: Tensor) -> None: ...

    def take(self, token: int) -> None: ...


class Choice:
    """Chooses tokens of one sequence: the same that transformers' loop chooses.

    Its processors are computed in place, in their order; tokens are drawn from the same random
    numbers.

    Parameters
    ----------
    processors
        Of transformers, all of which this module :func:`knows`.
    draws
        Whether tokens are drawn, and not the likeliest ones taken.
    ids
        The prompt.
    vocabulary
        How many logits there are.
    generator
        Of the random numbers; torch's own unless given.
    """

    def __init__(
        self,
        processors: Iterable[Any],
        draws: bool,
        ids: Sequence[int],
        vocabulary: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self._steps = [_STEPS[type(each)](each, ids, vocabulary) for each in processors]
        self._draws, self._generator = draws, generator
        self._row = torch.empty(1, vocabulary)
        self._flat = self._row[0]
        self._numbers = self._flat.numpy()

    def choose(self, logits: Tensor) -> int:
        """Return the token that follows by ``logits`` ``[V]``, which stay as they are."""
        self._flat.copy_(logits)
        for step in self._steps:
            step(self._flat)
        if self._draws:
            chances = torch.softmax(self._row, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=self._generator))
        else:
            token = int(self._numbers.argmax())
        for step in self._steps:
            step.take(token)
        return token


class _Stateless:
    def take(self, token: int) -> None:
        """Nothing changes by it."""


class _Temperature(_Stateless):
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._temperature = processor.temperature

    def __call__(self, row: Tensor) -> None:
        row.div_(self._temperature)


class _TopK(_Stateless):
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._count = min(processor.top_k, vocabulary)

    def __call__(self, row: Tensor) -> None:
        least = torch.topk(row, self._count).values[-1]
        row.masked_fill_(row < least, _NEVER)


class _TopP(_Stateless):
    """Looks among the likeliest tokens first, and sorts all where more than those are left."""

    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._share = processor.top_p
        self._kept = processor.min_tokens_to_keep

    def __call__(self, row: Tensor) -> None:
        if len(row) < 16 * _LIKELIEST or not self._among_likeliest(row):
            logits, order = torch.sort(row)
            unlikely = logits.softmax(dim=-1).cumsum(dim=-1) <= 1 - self._share
            unlikely[-self._kept :] = False
            row[order[unlikely]] = _NEVER

    def _among_likeliest(self, row: Tensor) -> bool:
        """Do it if the likeliest tokens have all of the share, and some more for rounding."""
        logits, order = torch.topk(row, _LIKELIEST)
        chances = (logits - row.logsumexp(dim=-1)).exp().double()
        above = chances.cumsum(dim=-1)
        if above[-1] < self._share + _ROUNDING:
            return False
        likely = 1 - (above - chances) > 1 - self._share
        likely[: self._kept] = True
        row.fill_(_NEVER)
        row[order[likely]] = logits[likely]
        return True


class _MinP(_Stateless):
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._share = processor.min_p

    def __call__(self, row: Tensor) -> None:
        chances = torch.softmax(row, dim=-1)
        row.masked_fill_(chances < self._share * chances.amax(), _NEVER)


class _Seen:
    """Distinct tokens of a sequence, in a tensor that grows in place."""

    def __init__(self, ids: Iterable[int], vocabulary: int) -> None:
        self._places: dict[int, int] = {}
        self._ids = torch.empty(vocabulary, dtype=torch.long)
        self._vocabulary = vocabulary
        for token in ids:
            self.place(token)

    def place(self, token: int) -> int | None:
        """Return where a token stands, added if it is new; None for one without a logit."""
        if not 0 <= token < self._vocabulary:
            return None
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            self._ids[place] = token
        return place

    @property
    def ids(self) -> Tensor:
        """All of them, in the order of their places."""
        return self._ids[: len(self._places)]


class _Repetition:
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._penalty = processor.penalty
        self._seen = _Seen(ids, vocabulary)

    def __call__(self, row: Tensor) -> None:
        ids = self._seen.ids
        logits = row[ids]
        row[ids] = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)

    def take(self, token: int) -> None:
        """From now on, it is one that occurred."""
        self._seen.place(token)


class _Occurrence:
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._presence, self._frequency = processor.presence, processor.frequency
        self._seen = _Seen((), vocabulary)
        self._counts = torch.zeros(vocabulary)

    def __call__(self, row: Tensor) -> None:
        ids = self._seen.ids
        row[ids] -= self._presence + self._frequency * self._counts[: len(ids)]

    def take(self, token: int) -> None:
        """It occurred once more."""
        place = self._seen.place(token)
        if place is not None:
            self._counts[place] += 1


class _NoEnd:
    """Lets no end token through while there are too few tokens."""

    def __init__(self, least: int, ends: Tensor, length: int) -> None:
        self._left, self._ends = least - length, ends

    def __call__(self, row: Tensor) -> None:
        if self._left > 0:
            row[self._ends] = _NEVER

    def take(self, token: int) -> None:
        """One more is there."""
        self._left -= 1


class _Guided:
    def __init__(self, processor: Any, ids: Sequence[int], vocabulary: int) -> None:
        self._guides = processor.guides

    def __call__(self, row: Tensor) -> None:
        for guide in self._guides:
            guide.mask(row)

    def take(self, token: int) -> None:
        """Every guide goes on by it."""
        for guide in self._guides:
            guide.take(token)


def _ordinary(processor: Any) -> bool:
    """Whether a processor has no settings but those that a call of ``generate`` gives it."""
    unusual = ("prompt_ignore_length", "logits_indices", "cu_seq_lens_q")
    return all(getattr(processor, name, None) is None for name in unusual) and (
        getattr(processor, "filter_value", _NEVER) == _NEVER
    )


def _min_length(processor: Any, ids: Sequence[int], vocabulary: int) -> _Step:
    return _NoEnd(processor.min_length, _logits_of(processor, vocabulary), len(ids))


def _min_new_tokens(processor: Any, ids: Sequence[int], vocabulary: int) -> _Step:
    new = len(ids) - processor.prompt_length_to_skip
    return _NoEnd(processor.min_new_tokens, _logits_of(processor, vocabulary), new)


def _logits_of(processor: Any, vocabulary: int) -> Tensor:
    """Return the end tokens that have logits."""
    ends: Tensor = processor.eos_token_id
    return ends[(ends >= 0) & (ends < vocabulary)]


_STEPS: dict[type, Callable[[Any, Sequence[int], int], _Step]] = {
    RepetitionPenaltyLogitsProcessor: _Repetition,
    OccurrencePenalties: _Occurrence,
    GuidedLogits: _Guided,
    MinLengthLogitsProcessor: _min_length,
    MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    TemperatureLogitsWarper: _Temperature,
    TopKLogitsWarper: _TopK,
    TopPLogitsWarper: _TopP,
    MinPLogitsWarper: _MinP,
}
"""What computes a processor's part."""
