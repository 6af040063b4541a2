"""What the devices' events share: their errors, a patient poll, and the event of no work."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpu_experts.errors import DeviceFailedError, DeviceTimeoutError

_SUSPENDED = "the machine may have been suspended, or the device hangs: load the model again"
#: A poll looks without a pause for this long, then pauses between looks: longer than a layer of a
#: token takes on a GPU, as a pause may end late (on Windows by half a millisecond).
_EAGER_S = 2e-3
_PAUSE_S = 50e-6


def timed_out(what: str, timeout_s: float) -> DeviceTimeoutError:
    """The error of a wait for ``what`` that took too long."""
    return DeviceTimeoutError(f"{what} did not finish in {timeout_s:g} s", hint=_SUSPENDED)


def failed(what: str, reason: BaseException | str) -> DeviceFailedError:
    """The error of ``what`` having failed for ``reason``."""
    return DeviceFailedError(f"{what} failed: {reason}")


def poll(over: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Return when ``over()``; other threads run meanwhile.

    Raises
    ------
    DeviceTimeoutError
        When that takes longer than ``timeout_s``.
    """
    start = time.perf_counter()
    while not over():
        passed = time.perf_counter() - start
        if passed > timeout_s:
            raise timed_out(what, timeout_s)
        time.sleep(0.0 if passed < _EAGER_S else _PAUSE_S)


class DoneEvent:
    """Work of no length, done at ``now``."""

    failure = None

    def __init__(self, what: str, now: float) -> None:
        self.what = what
        self._now = now

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        return

    def span(self) -> tuple[float, float]:
        return self._now, self._now
