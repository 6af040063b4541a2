"""How far other programs disturb measurements, and which of those are least disturbed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Generic, NamedTuple, TypeVar

import psutil

DISTURBED = 0.05
"""Part of the processors' time from which on other programs' use of it spoils a measurement."""
_TICK_S = 0.02
"""Systems count in hundredths of a second, for every program by itself: so much is no news."""

LEAST = 3
"""Measurements that are kept however disturbed they are, if there are as many."""

T = TypeVar("T")


class Times(NamedTuple):
    """Seconds of all processors since some moment: busy, busy with this program, and all."""

    busy_s: float
    own_s: float
    all_s: float


def system_times() -> Times:
    """Ask the operating system; what a virtual machine's host takes away counts as busy."""
    times, mine = psutil.cpu_times(), psutil.Process().cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # count as user
    total = sum(times) - guests
    return Times(total - waiting, mine.user + mine.system, total)


class Others:
    """How much of the processors other programs use while this one measures.

    Parameters
    ----------
    ask
        Returns what was counted so far; by the system unless given.
    """

    def __init__(self, ask: Callable[[], Times] | None = None) -> None:
        self._ask = system_times if ask is None else ask
        self._last = self._ask()

    def lap(self) -> float:
        """Part of all processors' time since the last call that went to others, 0 to 1."""
        now, last = self._ask(), self._last
        self._last = now
        others_s = (now.busy_s - last.busy_s) - (now.own_s - last.own_s) - _TICK_S
        all_s = now.all_s - last.all_s
        return min(1.0, max(0.0, others_s / all_s)) if all_s > 0 else 0.0


class Turns(Generic[T]):
    """Measurements of one thing, and how far each was disturbed.

    The first one allocates and warms up; it counts only where it is alone.

    Parameters
    ----------
    others
        Tells what other programs used meanwhile.
    """

    def __init__(self, others: Others) -> None:
        self._others = others
        self._taken: list[tuple[T, float]] = []

    def __len__(self) -> int:
        return len(self._taken)

    def measure(self, run: Callable[[], T]) -> T:
        """Run once more, keep what it returns, and return it."""
        self._others.lap()
        value = run()
        self._taken.append((value, self._others.lap()))
        return value

    def first(self) -> T:
        """Return what came first."""
        return self._taken[0][0]

    def wanting(self, calm: int) -> bool:
        """Whether fewer than ``calm`` of those that count were not disturbed.

        On a machine that is never calm it ends, too, after three times as many.
        """
        found = sum(share < DISTURBED for _, share in self._taken[1:])
        return found < calm and len(self) < 1 + 3 * calm

    def _kept(self) -> list[tuple[T, float]]:
        counting = self._taken[1:] or self._taken
        calm = [pair for pair in counting if pair[1] < DISTURBED]
        if len(calm) >= LEAST:
            return calm
        return sorted(counting, key=lambda pair: pair[1])[:LEAST]

    def kept(self) -> list[T]:
        """Return the calm ones, or where these are too few, the least disturbed ones."""
        return [value for value, _ in self._kept()]

    def disturbed(self) -> float:
        """Part of the processors' time that others took during :meth:`kept`, on average."""
        return fmean(share for _, share in self._kept()) if self._taken else 0.0
