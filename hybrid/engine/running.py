"""A text on its way: its tokens, what chooses the next one, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpu_experts.decoder.pages import PAGE, PagedSequence
from hybrid.engine.prefixes import common
from hybrid.loop.prepared import Prepared
from hybrid.session.generation_stream import GenerationStream

OnEnd = Callable[[BaseException | None], None]
"""Called when there is no more of a text; with what ended it before its time."""

_GROWTH = 1024
"""Tokens by which a text's memory grows at least."""


class Running:
    """A text that is written beside others.

    Parameters
    ----------
    prepared
        Its prompt, and how its tokens are chosen.
    stream
        Given the prompt and every token; what it raises ends the text.
    check
        Called between pieces of the prompt; what it raises ends the text.
    generator
        Of its random numbers.
    vocabulary
        How many logits there are.
    on_end
        See :data:`OnEnd`.

    Attributes
    ----------
    ids
        The prompt, and the tokens that have come.
    sequence
        Where their keys and values are; None before the first piece, and while it is set aside.
    ended
        Whether nothing more comes of it.
    aside
        Whether it waits until another text has ended, because there was no room for both.
    """

    def __init__(
        self,
        prepared: Prepared,
        stream: GenerationStream,
        check: Callable[[], None],
        generator: torch.Generator,
        vocabulary: int,
        on_end: OnEnd,
    ) -> None:
        self.ids = list(prepared.ids)
        self.sequence: PagedSequence | None = None
        self.stream, self.check, self.on_end = stream, check, on_end
        self.aside = False
        self._choice = prepared.choice(vocabulary, generator)
        self._ends = prepared.ends
        self._prompt = len(self.ids)
        self._buffer = torch.tensor([self.ids])
        self._numbers = self._buffer.numpy()[0]
        self._begun = self.ended = False
        self._followed: Running | None = None
        self._alike = 0

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are there."""
        return 0 if self.sequence is None else self.sequence.length()

    @property
    def missing(self) -> int:
        """Tokens that are to be computed before the next one can be chosen."""
        return len(self.ids) - self.computed

    def pending(self, count: int) -> list[int]:
        """Return so many tokens of those, the first ones."""
        return self.ids[self.computed : self.computed + count]

    @property
    def new_tokens(self) -> int:
        """Tokens that have come."""
        return len(self.ids) - self._prompt

    def follow(self, others: Sequence[Running]) -> None:
        """Wait for the one whose prompt begins most like this one's, to go on from what it has."""
        alike = [(common(each.ids, self.ids) // PAGE * PAGE, each) for each in others]
        length, other = max(alike, key=lambda pair: pair[0], default=(0, None))
        self._followed = other if length else None
        self._alike = length

    def waits(self) -> bool:
        """Whether another text is about to compute what this one begins with."""
        other = self._followed
        if other is None:
            return False
        if other.ended or other.aside or other.missing == 1 or other.computed >= self._alike:
            self._followed = other = None
        return other is not None

    def begin(self, reused: int) -> None:
        """Note that so many of its tokens need not be computed, the first time that it is known."""
        if not self._begun:
            self._begun = True
            self.stream.keep(reused)
            self.stream.put(torch.tensor([self.ids]))

    def accept(self, logits: Tensor) -> bool:
        """Choose the next token by ``logits`` ``[V]``; returns whether it was the last."""
        token = self._choice.choose(logits)
        length = len(self.ids)
        if length == len(self._numbers):
            more = max(_GROWTH, length)
            self._buffer = torch.nn.functional.pad(self._buffer, (0, more))
            self._numbers = self._buffer.numpy()[0]
        self._numbers[length] = token
        self.ids.append(token)
        ended = self._ends.met(token, length + 1, self._buffer)
        self.stream.put(self._buffer[0, length : length + 1].clone())
        if ended:
            self.stream.end()
        return ended
