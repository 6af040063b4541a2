"""Readers of answers that an engine gives."""

from __future__ import annotations

import queue
from typing import Any

from hybrid.serve.engine import Asked, Engine, Event, Failed, Job, Piece
from hybrid.serve.refusals import Refusal

GREEDY = {"do_sample": False}
LONG_S = 60
"""Seconds that nothing takes."""


class Reader:
    """Keeps the events of a job."""

    def __init__(self, asked: Any, engine: Engine, job: type[Job] = Job) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.job = job(Asked(asked, 5) if not isinstance(asked, Asked) else asked, self.events.put)
        engine.submit(self.job)

    def all(self) -> list[Event]:
        """Wait for the last event, and return all of them."""
        found: list[Event] = []
        while not found or isinstance(found[-1], Piece):
            found.append(self.events.get(timeout=LONG_S))
        return found

    def refusal(self) -> Refusal:
        (event,) = self.all()
        assert isinstance(event, Failed)
        return event.refusal


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))
