"""Answers requests in a thread of its own: many at once, or one after the other.

Many at once is :mod:`hybrid.engine`'s. What that does not write, and everything where there is none
of it, is answered alone, in the order in which it came, from one cache that is kept.
"""

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

from hybrid.engine.errors import TooLongError
from hybrid.engine.together import Together
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
    begun_s
        When that ended.
    left
        Set when nobody waits for the answer any more.
    ending
        Whether it was cut off because the server is about to end.
    """

    def __init__(self, asked: Asked, emit: Emit) -> None:
        self.asked = asked
        self.emit = emit
        self._made_s = time.perf_counter()
        self.begun_s = self._made_s
        self.waited_s = 0.0
        self.left = threading.Event()
        self.ending = False

    def begin(self) -> None:
        """Note how long it waited."""
        self.begun_s = time.perf_counter()
        self.waited_s = self.begun_s - self._made_s

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
    """Takes requests and has the model answer them, the first that came first.

    A request whose prompt begins like another's goes on from what is kept of that.

    Parameters
    ----------
    model
        Who answers.
    waiting
        Requests that may wait while others are answered; more are refused.
    together
        Writes several answers at once; one after the other unless given.
    """

    def __init__(self, model: HybridModel, waiting: int, together: Together | None = None) -> None:
        self._model = model
        self._together = together
        self._most_running = 1 if together is None else together.parallel
        self._most_waiting = waiting
        self._kept = KeptCache()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._alone: Job | None = None
        self._ending = False
        self._last_s = 1.0
        self._thread = threading.Thread(target=self._run, name="hybrid-engine", daemon=True)
        self._thread.start()

    @property
    def jobs(self) -> int:
        """Requests that are answered or wait."""
        with self._changed:
            return len(self._waiting) + len(self._running)

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
            ahead = len(self._waiting) + len(self._running)
            if ahead >= self._most_waiting + self._most_running:
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
        """Answer a request no further: its reader has gone. A running one ends within a step."""
        job.left.set()
        with self._changed:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
        if waited:
            job.emit(Failed(_gone()))

    def end(self, within_s: float) -> None:
        """Take no more requests, refuse those that wait, and let the running ones finish in time.

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
            if self._changed.wait_for(lambda: not self._running, within_s):
                return
            for job in self._running:
                job.ending = True
                job.left.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._ending)
                if not (self._waiting or self._running):
                    return
                begun = self._admitted()
            for job in begun:
                job.begin()
                if not self._joins(job):
                    self._alone = job
            if self._alone is not None and self._running == [self._alone]:
                job, self._alone = self._alone, None
                self._finish(job, self._answer(job))
            elif self._together is not None:
                self._together.round()

    def _admitted(self) -> list[Job]:
        """Take the request that is answered next, if it can be begun now.

        None joins while one waits to be answered alone, until the others are complete.
        """
        if not self._waiting or self._alone or len(self._running) >= self._most_running:
            return []
        self._running.append(self._waiting.popleft())
        return self._running[-1:]

    def _joins(self, job: Job) -> bool:
        """Begin a request beside the others, or end it; returns False for one that goes alone."""
        asked, together = job.asked, self._together
        if together is None:
            return False
        try:
            job.check()
            together.check_fits(asked.ids.shape[1])
            context = together.room or None
            writing = self._model.writing(asked.ids, context=context, **_options(job))

            def on_end(error: BaseException | None) -> None:
                done = Failed(_ending()) if job.ending else Done(writing.stream.generation())
                self._finish(job, done if error is None else self._failed(job, error))

            return together.admit(writing, asked.seed, job.check, on_end)
        except Exception as error:
            self._finish(job, self._failed(job, error))
            return True

    def _finish(self, job: Job, event: Event) -> None:
        with self._changed:
            self._last_s = time.perf_counter() - job.begun_s
            self._running.remove(job)
            self._changed.notify_all()
        job.emit(event)

    def _answer(self, job: Job) -> Event:
        """Write an answer alone, and return the event that ends it; no error ends the thread."""
        asked = job.asked
        try:
            job.check()
            if asked.seed is None:
                torch.seed()  # what another request's seed has begun is not gone on with
            else:
                torch.manual_seed(asked.seed)
            generation = self._model.write(
                asked.ids, kept=self._kept, on_prompt=job.check, **_options(job)
            )
        except Exception as error:
            if not isinstance(error, Stopped | HybridError):
                self._kept.forget()
            return self._failed(job, error)
        return Failed(_ending()) if job.ending else Done(generation)

    def _failed(self, job: Job, error: BaseException) -> Failed:
        """Return what a reader is told of an error; what is ours is shown here."""
        if isinstance(error, Stopped):
            return Failed(_ending() if job.ending else _gone())
        if isinstance(error, TooLongError):
            refusal = of_error(error, job.asked.field)
            refusal.status, refusal.code = 413, "context_length_exceeded"
            return Failed(refusal)
        if isinstance(error, UsageError):
            return Failed(of_error(error, job.asked.field))
        if isinstance(error, HybridError):
            return Failed(Refusal(str(error), status=500, kind=OURS))
        traceback.print_exception(error)
        name = type(error).__name__
        told = f"the model stopped with an error of ours ({name}), which the server has shown"
        return Failed(Refusal(told, status=500, kind=OURS))


def _options(job: Job) -> dict[str, Any]:
    """What :meth:`HybridModel.write` takes to answer a request, whoever else is answered."""
    asked = job.asked
    return {
        "on_text": lambda text: job.emit(Piece(text)),
        "on_thought": _thoughts(job) if asked.apart else None,
        "stop_strings": asked.stop,
        "streamer": _Watch(job),
        "max_new_tokens": asked.most,
        **asked.options,
    }


def _thoughts(job: Job) -> Callable[[str], None]:
    return lambda text: job.emit(Piece(text, thought=True))


def _ending() -> Refusal:
    return Refusal(_ENDING, status=503, kind=OURS, code="server_ending", retry_after_s=5)


def _gone() -> Refusal:
    return Refusal("the reader has gone", status=499)
