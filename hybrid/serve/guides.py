"""Guides of an answer's tokens: their chances noted, thoughts ended in time, a grammar kept to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.errors import UsageError
from hybrid.serve.parts import Chance

_NEVER = -torch.inf
_TAIL = 16


class Chances:
    """Notes how probable each token was, before temperature and whatever leaves tokens out.

    Parameters
    ----------
    text_of
        Returns a token's text.
    likeliest
        How many of the likeliest tokens are noted beside each.
    """

    def __init__(self, text_of: Callable[[int], str], likeliest: int) -> None:
        self._text_of, self._likeliest = text_of, likeliest
        self._row = torch.empty(0)
        self._all = 0.0
        self._fresh: list[Chance] = []

    def mask(self, row: Tensor) -> None:
        """Note the logits ``[V]``, which stay as they are."""
        if len(self._row) != len(row):
            self._row = torch.empty_like(row)
        self._row.copy_(row)
        self._all = float(self._row.logsumexp(dim=-1))

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        top: tuple[tuple[str, float], ...] = ()
        if self._likeliest:
            logits, ids = torch.topk(self._row, min(self._likeliest, len(self._row)))
            pairs = zip(ids.tolist(), logits.tolist(), strict=True)
            top = tuple((self._text_of(each), self._log(logit)) for each, logit in pairs)
        log = self._log(float(self._row[token]))
        self._fresh.append(Chance(self._text_of(token), log, top))

    def drain(self) -> tuple[Chance, ...]:
        """Return what was noted since the last time."""
        found = tuple(self._fresh)
        self._fresh.clear()
        return found

    def _log(self, logit: float) -> float:
        return max(logit - self._all, -9999.0)  # JSON has no infinity


class Thoughts:
    """Whether a sequence is within a thought that tags mark.

    Parameters
    ----------
    begins, ends
        The ids of the tags; several where a tag is spelled.
    open
        Whether the prompt has begun a thought.
    """

    def __init__(self, begins: Sequence[int], ends: Sequence[int], *, open: bool) -> None:
        self.begins, self.ends, self.open = list(begins), list(ends), open
        self._tail: list[int] = []

    def take(self, token: int) -> None:
        """Go on by a token."""
        self._tail.append(token)
        del self._tail[:-_TAIL]
        tag = self.ends if self.open else self.begins
        if tag and self._tail[-len(tag) :] == tag:
            self.open = not self.open
            self._tail.clear()


class Budget:
    """Ends a thought when it has so many tokens, with the template's own closing text.

    Parameters
    ----------
    tokens
        Of a thought, at most.
    closing
        The ids that end it.
    thoughts
        Knows whether there is one.
    """

    def __init__(self, tokens: int, closing: Sequence[int], thoughts: Thoughts) -> None:
        self._left, self._closing = tokens, list(closing)
        self._thoughts = thoughts
        self._forced: list[int] | None = None

    def mask(self, row: Tensor) -> None:
        """Let nothing but the closing text through, once the budget is spent."""
        if self._forced is None and self._left <= 0 and self._thoughts.open:
            self._forced = list(self._closing)
        if self._forced:
            row.fill_(_NEVER)
            row[self._forced[0]] = 0.0

    def take(self, token: int) -> None:
        """Count a token of a thought."""
        if self._forced:
            del self._forced[0]
        elif self._thoughts.open:
            self._left -= 1
        self._thoughts.take(token)


class Kept:
    """Lets only those tokens through that a grammar allows, thoughts before it apart.

    Parameters
    ----------
    matcher
        Of llguidance.
    thoughts
        Which the grammar does not count; None where there are none.
    told
        What the grammar is called in messages.
    """

    def __init__(self, matcher: Any, thoughts: Thoughts | None, told: str) -> None:
        self._matcher, self._thoughts, self._told = matcher, thoughts, told
        self._begun = False
        self._out = torch.empty(0, dtype=torch.bool)

    def mask(self, row: Tensor) -> None:
        """Rule out what the grammar does not allow.

        Raises
        ------
        UsageError
            When that takes more work than a token may.
        """
        if self._thinking:
            return
        if len(self._out) < len(row):
            self._make_room(len(row))
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), self._words.nbytes)
        self._check()
        np.bitwise_and(self._words.numpy()[:, None], self._bits, out=self._each)
        np.equal(self._flat, 0, out=self._out.numpy())
        first = self._thoughts.begins[0] if self._may_think and self._thoughts else -1
        if first >= 0:
            self._out[first] = False
        row.masked_fill_(self._out[: len(row)], _NEVER)

    def take(self, token: int) -> None:
        """Go on by a token."""
        thoughts = self._thoughts
        if thoughts is not None and not self._begun:
            inside = thoughts.open
            thoughts.take(token)
            if inside or thoughts.open:
                return
        self._begun = True
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    @property
    def _thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.open and not self._begun

    @property
    def _may_think(self) -> bool:
        """Whether the next token may begin a thought."""
        return not self._begun and self._thoughts is not None and len(self._thoughts.begins) == 1

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                f"{self._told} takes more work than a token may: {first_line(self._matcher)}"
            )

    def _make_room(self, vocabulary: int) -> None:
        words = -(-vocabulary // 32)
        self._words = torch.zeros(words, dtype=torch.int32)
        self._bits = (1 << np.arange(32, dtype=np.uint32)).view(np.int32)[None]
        self._each = np.empty((words, 32), dtype=np.int32)
        self._flat = self._each.reshape(-1)
        self._out = torch.empty(words * 32, dtype=torch.bool)


def first_line(matcher: Any) -> str:
    """Return the first line of what a matcher has against a grammar."""
    lines = str(matcher.get_error()).strip().splitlines()
    return lines[0][:200] if lines else "no reason told"
