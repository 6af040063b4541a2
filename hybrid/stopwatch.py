"""The clock that work is timed with where it is done; who reports reads it there."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the seconds of one kind of work: ``with watch: ...`` times a piece of it.

    A piece that an error or an interrupt ends is not counted.

    Attributes
    ----------
    seconds
        What all pieces took since it was made or reset.
    pieces
        How many they were.
    """

    __slots__ = ("_begun_s", "_last_s", "pieces", "seconds")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all pieces."""
        self.seconds, self.pieces = 0.0, 0

    def start(self) -> None:
        """Begin a piece."""
        self._begun_s = time.perf_counter()

    def stop(self) -> None:
        """End the piece that was begun last, and count it."""
        self._last_s = time.perf_counter() - self._begun_s
        self.seconds += self._last_s
        self.pieces += 1

    def take_back(self) -> None:
        """Leave out the last piece, whose work was for nothing."""
        self.seconds -= self._last_s
        self.pieces -= 1

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.stop()
