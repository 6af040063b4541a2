"""Events on a GPU's streams, and their times on the host's clock."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from gpu_experts.cuda.runtime import RawEvent, Runtime
from gpu_experts.device import Event
from gpu_experts.errors import DeviceError
from gpu_experts.events import failed, poll, timed_out

#: Times between events are in float32 milliseconds: a reference older than this costs precision.
ANCHOR_S = 5.0


class Anchor:
    """An event of known time, by which the device's clock is mapped to the host's.

    Its time is known as well as its record and the answer follow each other: the closest of a
    few, as the very first has a lot to set up.
    """

    def __init__(self, runtime: Runtime, timeout_s: float) -> None:
        closest = math.inf
        for _ in range(3):
            raw, before = runtime.event(), time.perf_counter()
            raw.record(runtime.current())
            poll(raw.query, timeout_s, "a time stamp")
            passed = time.perf_counter() - before
            if passed < closest:
                closest, self.raw, self.time = passed, raw, before + passed / 2


class CudaEvent:
    """Work on a stream: first handed over, then enqueued (issued), then done."""

    def __init__(self, what: str, runtime: Runtime, anchor: Anchor) -> None:
        self.what = what
        self.failure: DeviceError | None = None
        self.start: RawEvent = runtime.event()
        self.end: RawEvent = runtime.event()
        self._anchor = anchor
        self._issued = threading.Event()
        self._done = False

    @property
    def issued(self) -> bool:
        """Whether it is enqueued on its stream, or failed before."""
        return self._issued.is_set()

    def settle(self, failure: DeviceError | None = None) -> None:
        """Say that it was enqueued, or why not; called once."""
        self.failure = failure
        self._issued.set()

    def done(self) -> bool:
        if not self._done and self._issued.is_set():
            self._done = self.failure is not None or self._reached()
        return self._done

    def _reached(self) -> bool:
        try:
            return self.end.query()
        except RuntimeError as error:
            self.failure = failed(self.what, error)
            return True

    def settled(self, timeout_s: float) -> None:
        """Return once it is enqueued or failed; DeviceTimeoutError when neither comes."""
        if not self._issued.wait(timeout_s):
            raise timed_out(self.what, timeout_s)

    def wait_issued(self, timeout_s: float) -> None:
        """Return once it is enqueued; raise as :meth:`wait` does when it will not be."""
        self.settled(timeout_s)
        if self.failure is not None:
            raise self.failure

    def wait(self, timeout_s: float) -> None:
        poll(self.done, timeout_s, self.what)
        if self.failure is not None:
            raise self.failure

    def span(self) -> tuple[float, float] | None:
        if not self.done() or self.failure is not None:
            return None
        try:
            start, end = (
                self._anchor.raw.elapsed_time(raw) / 1e3 for raw in (self.start, self.end)
            )
        except RuntimeError:  # the device failed since
            return None
        return self._anchor.time + start, self._anchor.time + end


def over(event: Event) -> bool:
    """Whether ``event`` ended well and nothing needs to wait for it."""
    return event.done() and getattr(event, "failure", None) is None


def issued(event: Event) -> bool:
    """Whether a stream can wait for ``event``, or nothing needs to."""
    return event.issued if isinstance(event, CudaEvent) else event.done()


def require(needs: Sequence[Event], what: str) -> None:
    """Raise when something that ``what`` needs failed."""
    for need in needs:
        failure = getattr(need, "failure", None)
        if failure is not None:
            raise failed(what, failure)
