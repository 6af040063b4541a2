"""Turns token ids into text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hybrid.errors import UsageError, first_line

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

#: Most ids of the prompt that are decoded with the first new ones.
_CONTEXT_TOKENS = 8


#: After so many ids that make no text, what they decode to is told and decoding starts afresh.
_MOST_WAITING = 32


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TextStream:
    """Text of a growing id sequence, piece by piece.

    The pieces, joined, are the text that decoding all the new ids at once gives, cut before
    the first stop string. A piece is held back only while it may be part of a character
    or of a stop string that is not complete yet.

    Parameters
    ----------
    tokenizer
        Decodes ids to text.
    prompt_ids
        What the new ids follow; its text is not part of the stream.
    stop_strings
        The text ends before the first of these. Empty strings are not allowed.

    Attributes
    ----------
    stopped
        Whether a stop string was met; nothing more comes after it.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._cut = UntilStop(stop_strings)
        # A token's text can depend on its left neighbour (a leading space), so the ids of the
        # last complete text stay in the window; they must not start inside a character.
        self._window = self._whole_end(prompt_ids)
        self._complete = len(self._window)
        self._told = len(self._decode(self._window))

    @property
    def stopped(self) -> bool:
        return self._cut.stopped

    def put(self, ids: Sequence[int]) -> str:
        """Take the next ids and return the text that is certain by now."""
        if self.stopped:
            return ""
        self._window.extend(ids)
        text = self._decode(self._window)
        # An unfinished character decodes to replacement characters; tokenizers that spell
        # characters in bytes replace the whole characters right before it as well.
        waiting = len(self._window) - self._complete
        certain = len(text.rstrip(_REPLACEMENT)) if waiting < _MOST_WAITING else len(text)
        piece = text[self._told : certain]
        if certain == len(text) and (piece or waiting >= _MOST_WAITING):
            self._window = self._window[self._complete :]
            self._complete = len(self._window)
            self._told = len(self._decode(self._window))
        else:
            self._told = max(self._told, certain)
        return self._cut.put(piece)

    def finish(self) -> str:
        """Return what was held back, once no more ids will come."""
        if self.stopped:
            return ""
        return self._cut.rest() + self._decode(self._window)[self._told :]

    def _whole_end(self, ids: Sequence[int]) -> list[int]:
        """Return the fewest last ``ids`` whose text does not start inside a character."""
        for length in range(1, min(len(ids), _CONTEXT_TOKENS)):
            if not self._decode(list(ids[-length:])).startswith(_REPLACEMENT):
                return list(ids[-length:])
        return list(ids[-_CONTEXT_TOKENS:])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class UntilStop:
    """A text up to the first stop string, piece by piece.

    Attributes
    ----------
    stopped
        Whether one was met; nothing more comes after it.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def put(self, piece: str) -> str:
        """Return ``piece`` before a stop string; hold back an end that may become one."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        keep = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return what was held back, once no more will come."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins, short of all."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def as_ids(prompt: Any) -> torch.Tensor:
    """Return token ids as ``[B, T]``."""
    try:
        ids = torch.as_tensor(prompt, dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a prompt is a text or token ids, not {type(prompt).__name__}: {first_line(error)}",
            hint="generate from one text at a time, or from ids of equal length",
        ) from error
    if ids.dim() not in (1, 2):
        raise UsageError(
            f"token ids are {list(ids.shape)}, they must be [T] or [B, T]",
            hint="a single token is a list of one id",
        )
    return ids[None] if ids.dim() == 1 else ids
