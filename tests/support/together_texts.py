"""Texts that are written together, and what they would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrid.engine.together import Together
from hybrid.session.generation import Generation
from hybrid.session.generation_stream import Stopped
from hybrid.session.model import HybridModel

GREEDY = {"do_sample": False}
SIZE = 1 << 24
"""Memory for more than any test writes."""


class Text:
    """A text of a :class:`Together`, and what comes of it."""

    def __init__(
        self,
        together: Together,
        model: HybridModel,
        ids: Any,
        most: int,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self.left, self.ended = False, False
        self.error: BaseException | None = None
        ids = torch.as_tensor(ids).reshape(1, -1)
        self.writing = model.writing(
            ids, context=together.room, max_new_tokens=most, on_text=on_text, **options
        )
        assert together.admit(self.writing, seed, self._check, self._end)

    def _check(self) -> None:
        if self.left:
            raise Stopped

    def _end(self, error: BaseException | None) -> None:
        assert not self.ended
        self.ended, self.error = True, error

    @property
    def generation(self) -> Generation:
        return self.writing.stream.generation()

    @property
    def ids(self) -> list[int]:
        return self.generation.ids[0].tolist()


def finish(together: Together, texts: list[Text]) -> None:
    """Go round until all have ended, looking at the memory each time."""
    for _ in range(2000):
        if all(text.ended for text in texts):
            return
        together.round()
        together.check_integrity()
    raise AssertionError("texts do not end")


def alone(model: HybridModel, ids: Any, most: int, seed: int | None = None, **options: Any) -> Any:
    """The tokens of a text that nothing is computed beside."""
    if seed is not None:
        torch.manual_seed(seed)
    ids = torch.as_tensor(ids).reshape(1, -1)
    return model.write(ids, max_new_tokens=most, **options).ids[0].tolist()


def prompt(seed: int, length: int, model: HybridModel) -> list[int]:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.loaded.vocabulary, (length,), generator=numbers).tolist()
