"""What stands beside transformers' generation loop: a clock, the text so far, a way out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hybrid.ledger.metrics import GenerationTimes
from hybrid.textstream import TextStream

OnText = Callable[[str], None]


class Stopped(Exception):  # noqa: N818 (a signal, as StopIteration is)
    """Raised inside the loop to leave it; never reaches the caller of a public method."""


class Watch(BaseStreamer):
    """A streamer that times every token and turns them into text.

    Parameters
    ----------
    streamer
        The caller's own streamer; is told everything too.
    text
        Makes text of the ids; leaves the loop at a stop string.
    on_text
        Is given each piece of text.
    limit, limit_name
        The number of new tokens that the loop was told to end at, and why that number.
    """

    def __init__(
        self,
        *,
        streamer: Any = None,
        text: TextStream | None = None,
        on_text: OnText | None = None,
        limit: int | None = None,
        limit_name: str = "max_new_tokens",
    ) -> None:
        self.text = text
        self._streamer = streamer
        self._on_text = on_text
        self._limit, self._limit_name = limit, limit_name
        self._pieces: list[str] = []
        self._prompt_seen = self._complete = False
        self._new_tokens = 0
        self._first_s: float | None = None

    @property
    def streams(self) -> bool:
        """Whether somebody waits for tokens as they come."""
        return self._streamer is not None or self._on_text is not None

    @property
    def written(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def start(self, ids: torch.Tensor) -> None:
        """Start the clock; ``ids`` ``[B, T]`` is the prompt."""
        self._sequences, self._prompt_tokens = ids.shape
        self._start_s = self._last_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, ``[B, T]``, at first, then each step's new ids, ``[B]`` or ``[1, n]``.

        Raises
        ------
        Stopped
            At a stop string.
        """
        if self._streamer is not None:
            self._streamer.put(value)
        if not self._prompt_seen:
            self._prompt_seen = True
            self._sequences = value.shape[0]
            return
        self._last_s = time.perf_counter()
        if self._first_s is None:
            self._first_s = self._last_s
        self._new_tokens += value.numel() // self._sequences
        if self.text is not None:
            self._tell(self.text.put(value.flatten().tolist()))
            if self.text.stopped:
                self.end()
                raise Stopped

    def end(self) -> None:
        """Tell what was held back; nothing more will come."""
        self._complete = True
        if self.text is not None:
            self._tell(self.text.finish())
        if self._streamer is not None:
            self._streamer.end()

    def take(self, sequences: torch.Tensor) -> None:
        """Take the result, ``[B, T]``, of a search that shows no tokens before its end."""
        new = sequences[:, self._prompt_tokens :]
        self._new_tokens = new.shape[1]
        self._complete = True
        if self.text is not None:
            self._tell(self.text.put(new.flatten().tolist()))
            self._tell(self.text.finish())

    def times(self) -> GenerationTimes:
        """Return what was measured."""
        first_s = self._first_s
        return GenerationTimes(
            sequences=self._sequences,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            ttft_s=None if first_s is None else first_s - self._start_s,
            decode_s=0.0 if first_s is None else self._last_s - first_s,
            ended=self._why_ended(),
        )

    def _why_ended(self) -> str:
        if self.text is not None and self.text.stopped:
            return "stop string"
        if not self._complete:
            return "interrupted"
        if self._limit is None:
            return "end token or limit"
        return self._limit_name if self._new_tokens >= self._limit else "end token"

    def _tell(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)
