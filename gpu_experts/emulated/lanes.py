"""The emulated device's lanes: one that works in a thread of its own, one that only keeps time.

Both take work in order, start it when the lane is free and what it depends on is over, and
give back an event.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from gpu_experts.device import Event
from gpu_experts.errors import DeviceFailedError, DeviceTimeoutError
from gpu_experts.events import failed, timed_out

#: The part of a wait that is spent looking at the clock: a sleep may end this much late.
SPIN_S = 300e-6
#: How long closing waits for work that has begun.
CLOSING_S = 10.0


class Clock:
    """The real time; tests put another in its place."""

    def now(self) -> float:
        """Seconds, on ``time.perf_counter``'s scale."""
        return time.perf_counter()

    def until(self, deadline: float) -> None:
        """Return at ``deadline``, microseconds late at most on an idle core."""
        while (left := deadline - time.perf_counter()) > SPIN_S:
            time.sleep(left - SPIN_S)
        while time.perf_counter() < deadline:
            pass


class LaneEvent(Event, Protocol):
    """Work of a lane."""

    def settled(self, timeout_s: float) -> None:
        """Return once it is over, well or not; DeviceTimeoutError when that takes longer."""


class Lane(Protocol):
    """Takes work in order."""

    @property
    def last(self) -> LaneEvent | None:
        """What was submitted last."""

    def submit(
        self,
        what: str,
        work: Callable[[], object],
        seconds: float,
        *,
        after: Sequence[Event] = (),
        behind: Sequence[Event] = (),
    ) -> Event:
        """Enqueue ``work``, which takes ``seconds``.

        Parameters
        ----------
        seconds
            Its modelled length; infinite for work that never ends.
        after
            What must have ended well first; otherwise this fails too.
        behind
            What must be over first, well or not.
        """

    def close(self) -> None:
        """Take no more work; what is still waiting fails."""


class ThreadEvent:
    """Work of a :class:`ThreadLane`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.failure: DeviceFailedError | None = None
        self._over = threading.Event()
        self._span: tuple[float, float] | None = None

    def done(self) -> bool:
        return self._over.is_set()

    def settled(self, timeout_s: float) -> None:
        if not self._over.wait(timeout_s):
            raise timed_out(self.what, timeout_s)

    def wait(self, timeout_s: float) -> None:
        self.settled(timeout_s)
        if self.failure is not None:
            raise self.failure

    def span(self) -> tuple[float, float] | None:
        return self._span if self._over.is_set() else None

    def end(self, failure: DeviceFailedError | None, start: float, end: float) -> None:
        """Say how it ended; called once, by the lane."""
        self.failure = failure
        self._span = (start, end) if failure is None else None
        self._over.set()


class ThreadLane:
    """Works in a thread of its own; work takes at least its modelled length.

    Parameters
    ----------
    name
        Of the thread.
    clock
        What spans are read from.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self._clock = clock
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = threading.Event()
        self.last: ThreadEvent | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        what: str,
        work: Callable[[], object],
        seconds: float,
        *,
        after: Sequence[Event] = (),
        behind: Sequence[Event] = (),
    ) -> Event:
        self.last = ThreadEvent(what)
        self._queue.put((self.last, work, seconds, tuple(after), tuple(behind)))
        return self.last

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSING_S)  # work that never ends is left behind

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            self._run(*job)
            del job  # what it holds is large, and the next may be long in coming

    def _run(
        self,
        event: ThreadEvent,
        work: Callable[[], object],
        seconds: float,
        after: Sequence[Event],
        behind: Sequence[Event],
    ) -> None:
        start = end = 0.0
        failure = None
        try:
            self._await(after, behind)
            start = self._clock.now()
            if math.isfinite(seconds):
                work()
            self._pass(start + seconds)
            end = self._clock.now()
        except DeviceFailedError as error:
            failure = failed(event.what, error)
        except Exception as error:
            failure = failed(event.what, f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        event.end(failure, start, end)

    def _await(self, after: Sequence[Event], behind: Sequence[Event]) -> None:
        for event in (*behind, *after):
            while not event.done() and not self._closed.is_set():
                _patiently(event)
        if self._closed.is_set():
            raise DeviceFailedError("the device was closed")
        for event in after:
            event.wait(0)

    def _pass(self, deadline: float) -> None:
        """Let the modelled time pass, unless the device is closed meanwhile."""
        left = deadline - self._clock.now()
        if left > 0 and self._closed.wait(left if math.isfinite(left) else None):
            raise DeviceFailedError("the device was closed")


_Job = tuple[ThreadEvent, Callable[[], object], float, tuple[Event, ...], tuple[Event, ...]]


def _patiently(event: Event) -> None:
    """Wait a little for ``event``, however it ends."""
    try:
        event.wait(0.05)
    except (DeviceTimeoutError, DeviceFailedError):
        return


class ClockEvent:
    """Work of a :class:`ClockLane`: its span is known when it is submitted."""

    __slots__ = ("_clock", "end", "failure", "start", "what")

    def __init__(
        self,
        what: str,
        start: float,
        end: float,
        failure: DeviceFailedError | None,
        clock: Clock,
    ) -> None:
        self.what = what
        self.start = start
        self.end = end
        self.failure = failure
        self._clock = clock

    def done(self) -> bool:
        return self._clock.now() >= self.end

    def settled(self, timeout_s: float) -> None:
        now = self._clock.now()
        if now >= self.end:
            return
        self._clock.until(min(self.end, now + timeout_s))
        if self.end > now + timeout_s:
            raise timed_out(self.what, timeout_s)

    def wait(self, timeout_s: float) -> None:
        self.settled(timeout_s)
        if self.failure is not None:
            raise self.failure

    def span(self) -> tuple[float, float] | None:
        return (self.start, self.end) if self.failure is None and self.done() else None


class ClockLane:
    """Does no work and keeps time: each piece starts when the lane and its needs are over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.last: ClockEvent | None = None

    def submit(
        self,
        what: str,
        work: Callable[[], object],
        seconds: float,
        *,
        after: Sequence[Event] = (),
        behind: Sequence[Event] = (),
    ) -> Event:
        start = self._clock.now()
        if self.last is not None:
            start = max(start, self.last.end)
        failure = None
        for event in (*behind, *after):
            if isinstance(event, ClockEvent):
                if event.end > start:
                    start = event.end
                if event.failure is not None and event in after:
                    failure = failed(what, event.failure)
        if failure is None:
            try:
                work()
            except DeviceFailedError as error:
                failure = failed(what, error)
        self.last = ClockEvent(what, start, start + seconds, failure, self._clock)
        return self.last

    def close(self) -> None:
        self.last = None
