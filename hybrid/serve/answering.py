"""Has the engine answer a request, and hands on what comes of it, part by part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from hybrid.serve.engine import Done, Engine, Event, Failed, Job, Piece
from hybrid.serve.events import Answer
from hybrid.serve.parts import Chance, Part
from hybrid.serve.refusals import Refusal
from hybrid.serve.wanted import Wanted
from hybrid.session.generation import Generation

_Come = tuple[int, Event, tuple[Chance, ...]]
OnEnd = Callable[[Job, Done | Failed], None]
"""Called by the engine's thread when there is no more of an answer."""


class Answering:
    """The answers to one request, under way. For the thread of an event loop.

    Parameters
    ----------
    engine
        Who answers.
    wanted
        What the request wants.
    on_end
        See :data:`OnEnd`.

    Raises
    ------
    Refusal
        When the engine takes no more, or not as many.
    """

    def __init__(self, engine: Engine, wanted: Wanted, on_end: OnEnd) -> None:
        self._engine, self._wanted, self._on_end = engine, wanted, on_end
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Come] = asyncio.Queue()
        self._jobs: list[Job] = []
        for at in range(len(wanted.answers)):
            job = self._job(at)
            try:
                engine.submit(job)
            except Refusal:
                self.leave()
                raise
            self._jobs.append(job)

    def leave(self) -> None:
        """Write the answers no further: nobody reads them any more."""
        for job in self._jobs:
            self._engine.leave(job)

    async def come(self) -> AsyncIterator[tuple[int, Part | Generation | Refusal]]:
        """Yield which answer it is of, and a part, or how it went when it is complete.

        The first refusal ends all of them.
        """
        left = len(self._wanted.answers)
        while left:
            at, event, chances = await self._events.get()
            if isinstance(event, Failed):
                self.leave()
                yield at, event.refusal
                return
            parts = self._wanted.answers[at].parts
            if isinstance(event, Piece):
                found = parts.put(event.text, event.thought, chances)
            else:
                found = parts.finish()
            for part in found:
                yield at, part
            if isinstance(event, Done):
                left -= 1
                yield at, event.generation

    def _job(self, at: int) -> Job:
        single = self._wanted.answers[at]

        def emit(event: Event) -> None:
            if isinstance(event, Done | Failed):
                self._on_end(job, event)
            chances = () if single.chances is None else single.chances.drain()
            with suppress(RuntimeError):  # of a loop that is closed nobody reads
                self._loop.call_soon_threadsafe(self._events.put_nowait, (at, event, chances))

        job = Job(single.asked, emit)
        return job


async def streamed(answering: Answering, answer: Answer, answers: int) -> AsyncIterator[bytes]:
    """Yield what is sent of answers as they come; an error is an event of its own."""
    generations: dict[int, Generation] = {}
    for chunk in answer.begin(answers):
        yield chunk
    async for at, each in answering.come():
        if isinstance(each, Refusal):
            for chunk in answer.failed(each):
                yield chunk
            return
        if isinstance(each, Generation):
            generations[at] = each
            chunks = answer.end(at, each)
        else:
            chunks = answer.part(at, each)
        for chunk in chunks:
            yield chunk
    for chunk in answer.close([generations[at] for at in range(answers)]):
        yield chunk


async def collected(answering: Answering, answers: int) -> list[tuple[list[Part], Generation]]:
    """Return all parts of answers, and how they went.

    Raises
    ------
    Refusal
        When one of them ended before its time.
    """
    parts: list[list[Part]] = [[] for _ in range(answers)]
    generations: dict[int, Generation] = {}
    async for at, each in answering.come():
        if isinstance(each, Refusal):
            raise each
        if isinstance(each, Generation):
            generations[at] = each
        else:
            parts[at].append(each)
    return [(parts[at], generations[at]) for at in range(answers)]
