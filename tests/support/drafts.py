"""Drafts that know what will come, and are wrong where they are asked to be."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hybrid.ask.speculate import Speculate
from hybrid.loop.speculation import Drafts, Speculation


class Foretold(Drafts):
    """Drafts ``count`` tokens of a text that is known, each ``wrong`` one replaced by the next.

    Parameters
    ----------
    known
        The whole text, the prompt included.
    count
        Tokens of a draft.
    wrong
        Places in the text that are drafted wrongly.
    """

    def __init__(self, known: list[int], count: int, wrong: Collection[int] = ()) -> None:
        super().__init__(Speculation(Speculate.of(count)), ())
        self._known, self._count, self._wrong = known, count, wrong
        self._length: int | None = None
        self.sizes: list[int] = []

    def begin_after(self, prompt: list[int]) -> Foretold:
        """Say what is there already."""
        self._length = len(prompt)
        return self

    def add(self, token: int) -> None:
        """One more is there."""
        assert self._length is not None
        self._length += 1

    def propose(self, room: int) -> list[int]:
        """Draft what comes, as far as it is known."""
        if self.refused is not None:
            return []
        assert self._length is not None
        places = range(self._length, min(self._length + min(self._count, room), len(self._known)))
        draft = [self._known[at] + (at in self._wrong) for at in places]
        self.sizes.append(len(draft))
        return draft


def text_of(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """The whole text that transformers' own loop writes."""
    import torch

    ids = torch.tensor([prompt])
    found: list[int] = model.generate(ids, **options)[0].tolist()
    return found
