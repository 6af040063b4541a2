"""Watches a loop that generates: times its tokens, makes text of them, stops it early."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hybrid.ledger.metrics import GenerationTimes
from hybrid.loop.speculation import Drafts
from hybrid.session.answer_stream import AnswerStream
from hybrid.session.generation import DRAWN, Generation
from hybrid.textstream import TextStream
from planner.describe.terms import SAMPLING, TEXT

OnText = Callable[[str], None]


class Stopped(Exception):  # noqa: N818 (a signal, as StopIteration is)
    """Raised inside the loop to leave it; never reaches the caller of a public method."""


class GenerationStream(BaseStreamer):
    """A streamer that times every token of one call and turns them into text.

    Parameters
    ----------
    streamer
        The caller's own streamer; gets everything, too.
    text
        Makes text of the ids; leaves the loop at a stop string.
    on_text
        Called with each piece of text.
    limit, limit_name
        The number of new tokens at which the loop ends, and why it is that number.

    Attributes
    ----------
    on_first
        Called when the first new token has come, so that the prompt is computed.
    """

    def __init__(
        self,
        *,
        streamer: Any = None,
        text: TextStream | AnswerStream | None = None,
        on_text: OnText | None = None,
        limit: int | None = None,
        limit_name: str = "max_new_tokens",
    ) -> None:
        self.on_first: Callable[[], None] = lambda: None
        self._text = text
        self._streamer = streamer
        self._on_text = on_text
        self._limit, self._limit_name = limit, limit_name
        self._pieces: list[str] = []
        self._ids: list[torch.Tensor] = []
        self._prompt_seen = self._complete = False
        self._new_tokens = 0
        self._drafts: Drafts | None = None
        self._start_s: float | None = None
        self._first_s: float | None = None

    @property
    def started(self) -> bool:
        """Whether the loop has begun."""
        return self._start_s is not None

    @property
    def shows_tokens(self) -> bool:
        """Whether somebody waits for tokens as they come."""
        return self._streamer is not None or self._on_text is not None

    def before_first(self, told: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
        """Return ``told``, which is called no more from the first new token on."""
        if told is None:
            return None
        return lambda at: told(at) if self._first_s is None else None

    def start(
        self,
        ids: torch.Tensor,
        *,
        chosen: str = "",
        kept: int = 0,
        drafts: Drafts | None = None,
    ) -> None:
        """Start the clock; ``ids`` ``[B, T]`` is the prompt.

        ``chosen`` says how tokens are chosen; ``kept`` tokens at the prompt's beginning need not be
        computed; ``drafts`` are asked at the end what came of them.
        """
        self._chosen, self._kept, self._drafts = chosen, kept, drafts
        self._sequences, self._prompt_tokens = ids.shape
        self._start_s = self._last_s = time.perf_counter()

    def keep(self, tokens: int) -> None:
        """Note that so many tokens at the prompt's beginning need not be computed."""
        self._kept = tokens

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
            self.on_first()
        self._new_tokens += value.numel() // self._sequences
        self._ids.append(value)
        if self._text is not None:
            self._write(self._text.put(value.flatten().tolist()))
            if self._text.stopped:
                self.end()
                raise Stopped

    def end(self) -> None:
        """Write the text that was held back; nothing more will come."""
        self._complete = True
        if self._text is not None:
            self._write(self._text.finish())
        if self._streamer is not None:
            self._streamer.end()

    def take(self, result: Any) -> None:
        """Take what transformers' ``generate`` returned: a search shows no tokens before."""
        if self._complete:
            return
        new = getattr(result, "sequences", result)[:, self._prompt_tokens :]
        self._new_tokens = new.shape[1]
        self._ids = [new]
        self._complete = True
        if self._text is not None:
            self._write(self._text.put(new.flatten().tolist()))
            self._write(self._text.finish())

    def generation(self, result: Any = None) -> Generation:
        """Return what the call made.

        ``result`` is what transformers' ``generate`` returned; None where it was left early.
        """
        new = [step if step.ndim == 2 else step[:, None] for step in self._ids]
        return Generation(
            text="".join(self._pieces),
            ids=torch.cat(new, dim=1) if new else torch.empty(self._sequences, 0, dtype=torch.long),
            times=self._times(),
            chosen=self._chosen,
            result=result,
        )

    def _times(self) -> GenerationTimes:
        start_s, first_s = self._start_s, self._first_s
        also = ((SAMPLING, self._chosen.startswith(DRAWN)), (TEXT, self._text is not None))
        return GenerationTimes(
            sequences=self._sequences,
            prompt_tokens=self._prompt_tokens - self._kept,
            new_tokens=self._new_tokens,
            ttft_s=None if first_s is None or start_s is None else first_s - start_s,
            decode_s=0.0 if first_s is None else self._last_s - first_s,
            ended=self._why_ended(),
            extras=tuple(name for name, happened in also if happened),
            kept_tokens=self._kept,
            speculated=None if self._drafts is None else self._drafts.summary(),
        )

    def _why_ended(self) -> str:
        if self._text is not None and self._text.stopped:
            return "stop string"
        if not self._complete:
            return "interrupted"
        if self._limit is None:
            return "end token or limit"
        return self._limit_name if self._new_tokens >= self._limit else "end token"

    def _write(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


def pieces_of(write: Callable[[OnText], object]) -> Iterator[str]:
    """Yield the pieces of text that ``write`` hands on, as they come.

    ``write`` runs in a thread of its own, which is stopped when the iterator is closed early.
    """
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    closed = threading.Event()
    failure: list[BaseException] = []

    def on_text(piece: str) -> None:
        if closed.is_set():
            raise Stopped
        pieces.put(piece)

    def run() -> None:
        try:
            write(on_text)
        except BaseException as error:
            failure.append(error)
        finally:
            pieces.put(None)

    writer = threading.Thread(target=run, name="hybrid-generate", daemon=True)
    writer.start()
    try:
        yield from iter(pieces.get, None)
    finally:
        closed.set()
        writer.join()
    if failure:
        raise failure[0]
