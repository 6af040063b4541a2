"""A text on its way: its tokens, what chooses the next one, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpu_experts.decoder.pages import PAGE, PagedSequence
from hybrid.ask.speculate import MOST_DRAFTED
from hybrid.engine.prefixes import common
from hybrid.loop.prepared import Prepared
from hybrid.loop.speculation import Drafts
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
    drafts
        What drafts its tokens where nothing is computed beside it; None where nothing is to.

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
        drafts: Drafts | None = None,
    ) -> None:
        self.ids = list(prepared.ids)
        self.sequence: PagedSequence | None = None
        self.stream, self.check, self.on_end = stream, check, on_end
        self.aside, self.drafts = False, drafts
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

    def draft(self, room: int) -> list[int]:
        """Return tokens that are likely to follow, ``room`` at most in the memory."""
        if self.drafts is None:
            return []
        longest = room if self._ends.longest is None else min(room, self._ends.longest)
        return self.drafts.propose(min(MOST_DRAFTED, longest - len(self.ids) - 1))

    def accept(self, logits: Tensor, draft: Sequence[int] = ()) -> tuple[int, bool]:
        """Choose the tokens that follow by ``logits`` ``[T, V]``, as far as they were drafted.

        The sequence holds the draft: what was not chosen of it is cut off before anybody sees
        another token.

        Returns
        -------
        How many were chosen, and whether the text ended with the last one.
        """
        for place in range(len(draft) + 1):
            ended = self._add(self._choice.choose(logits[place]))
            token = self.ids[-1]
            last = ended or place == len(draft) or token != draft[place]
            if last:
                self._cut()
            try:
                self.stream.put(self._buffer[0, len(self.ids) - 1 : len(self.ids)].clone())
            except BaseException:
                self._cut()
                raise
            if self.drafts is not None:
                self.drafts.add(token)
            if last:
                break
        if ended:
            self.stream.end()
        return place + 1, ended

    def _cut(self) -> None:
        """Forget what the sequence holds beyond the last but one token."""
        if self.sequence is not None and self.sequence.length() >= len(self.ids):
            self.sequence.cut(len(self.ids) - 1)

    def _add(self, token: int) -> bool:
        """Take the next token; returns whether it is the last."""
        length = len(self.ids)
        if length == len(self._numbers):
            more = max(_GROWTH, length)
            self._buffer = torch.nn.functional.pad(self._buffer, (0, more))
            self._numbers = self._buffer.numpy()[0]
        self._numbers[length] = token
        self.ids.append(token)
        return self._ends.met(token, length + 1, self._buffer)
