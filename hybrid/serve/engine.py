"""Answers requests one after the other, in a thread of its own, from one cache that is kept."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybrid.errors import UsageError
from hybrid.formats.errors import HybridError
from hybrid.serve.refusals import BUSY, OURS, Refusal, of_error
from hybrid.session.generation import Generation
from hybrid.session.generation_stream import Stopped
from hybrid.session.kept_cache import KeptCache
from hybrid.session.model import HybridModel

_LAST_S = 5
"""Seconds in which an answer that is cut off has to end; the program does not wait longer."""

_ENDING = "the server is about to end; ask again when it is back"


@dataclass(frozen=True, eq=False)
class Asked:
    """What a request asks of the model, checked.

    Attributes
    ----------
    ids
        The prompt, ``[1, T]``.
    most
        New tokens at most.
    options
        What :meth:`HybridModel.write` takes besides.
    apart
        Whether thoughts are told apart from the text.
    stop
        Texts that the answer ends before; None for the model's own.
    seed
        Makes what is drawn repeatable.
    field
        The request's field that holds the prompt.
    """

    ids: Tensor
    most: int
    options: dict[str, Any] = field(default_factory=dict)
    apart: bool = False
    stop: list[str] | None = None
    seed: int | None = None
    field: str = "prompt"


@dataclass(frozen=True)
class Piece:
    """A piece of the answer, or of a thought before it."""

    text: str
    thought: bool = False


@dataclass(frozen=True, eq=False)
class Done:
    """The answer is complete, or its reader has gone."""

    generation: Generation


@dataclass(frozen=True, eq=False)
class Failed:
    """There is no more of an answer, and why."""

    refusal: Refusal


Event = Piece | Done | Failed
Emit = Callable[[Event], None]


class Job:
    """A request; ``emit`` is called with what comes of it, by the engine's thread.

    The last event is a :class:`Done` or a :class:`Failed`.

    Attributes
    ----------
    waited_s
        Seconds that it waited for others.
    left
        Set when nobody waits for the answer any more.
    ending
        Whether it was cut off because the server is about to end.
    """

    def __init__(self, asked: Asked, emit: Emit) -> None:
        self.asked = asked
        self.emit = emit
        self._made_s = time.perf_counter()
        self.waited_s = 0.0
        self.left = threading.Event()
        self.ending = False

    def begin(self) -> None:
        """Note how long it waited."""
        self.waited_s = time.perf_counter() - self._made_s

    def check(self, _: object = None) -> None:
        """Raise Stopped when nobody waits for the answer any more."""
        if self.left.is_set():
            raise Stopped


class _Watch:
    """A streamer that shows nothing and ends the text when its reader has gone."""

    def __init__(self, job: Job) -> None:
        self.put = job.check

    def end(self) -> None:
        """Nothing is held back."""


class Engine:
    """Takes requests and has the model answer them in their order.

    The cache of the last one is kept: a request whose prompt begins the same goes on from there.

    Parameters
    ----------
    model
        Who answers.
    waiting
        Requests that may wait while one is answered; more are refused.
    """

    def __init__(self, model: HybridModel, waiting: int) -> None:
        self._model = model
        self._most_waiting = waiting
        self._kept = KeptCache()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._ending = False
        self._last_s = 1.0
        self._thread = threading.Thread(target=self._run, name="hybrid-engine", daemon=True)
        self._thread.start()

    @property
    def jobs(self) -> int:
        """Requests that are answered or wait."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    def submit(self, job: Job) -> None:
        """Take a request.

        Raises
        ------
        Refusal
            When as many wait as may, or the server is about to end.
        """
        with self._changed:
            if self._ending:
                raise _ending()
            ahead = len(self._waiting) + (self._running is not None)
            if ahead > self._most_waiting:
                raise Refusal(
                    f"{ahead} requests are being answered or wait and no more than "
                    f"{self._most_waiting} may wait: ask again later",
                    status=429,
                    kind=BUSY,
                    code="queue_full",
                    retry_after_s=math.ceil(max(1.0, self._last_s)),
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def leave(self, job: Job) -> None:
        """Answer a request no further: its reader has gone. A running one ends within a token."""
        job.left.set()
        with self._changed:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
        if waited:
            job.emit(Failed(_gone()))

    def end(self, within_s: float) -> None:
        """Take no more requests, refuse those that wait, and let the running one finish in time.

        One that takes longer is cut off; its reader is told.
        """
        with self._changed:
            self._ending = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in refused:
            job.emit(Failed(_ending()))
        with self._changed:
            running = self._running
            if self._changed.wait_for(lambda: self._running is None, within_s):
                return
        if running is not None:
            running.ending = True
            running.left.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            begun_s = time.perf_counter()
            job.begin()
            event = self._answer(job)
            with self._changed:
                self._last_s = time.perf_counter() - begun_s
                self._running = None
                self._changed.notify_all()
            job.emit(event)

    def _answer(self, job: Job) -> Event:
        """Write an answer, and return the event that ends it; no error ends the thread."""
        asked = job.asked
        try:
            job.check()
            if asked.seed is None:
                torch.seed()  # what another request's seed has begun is not gone on with
            else:
                torch.manual_seed(asked.seed)
            generation = self._model.write(
                asked.ids,
                on_text=lambda text: job.emit(Piece(text)),
                on_thought=_thoughts(job) if asked.apart else None,
                stop_strings=asked.stop,
                streamer=_Watch(job),
                kept=self._kept,
                max_new_tokens=asked.most,
                on_prompt=job.check,
                **asked.options,
            )
        except Stopped:
            return Failed(_ending() if job.ending else _gone())
        except UsageError as error:
            return Failed(of_error(error, asked.field))
        except HybridError as error:
            return Failed(Refusal(str(error), status=500, kind=OURS))
        except Exception as error:
            traceback.print_exc()
            self._kept.forget()
            name = type(error).__name__
            told = f"the model stopped with an error of ours ({name}), which the server has shown"
            return Failed(Refusal(told, status=500, kind=OURS))
        return Failed(_ending()) if job.ending else Done(generation)


def _thoughts(job: Job) -> Callable[[str], None]:
    return lambda text: job.emit(Piece(text, thought=True))


def _ending() -> Refusal:
    return Refusal(_ENDING, status=503, kind=OURS, code="server_ending", retry_after_s=5)


def _gone() -> Refusal:
    return Refusal("the reader has gone", status=499)
