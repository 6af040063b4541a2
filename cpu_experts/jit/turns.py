"""A lock that a forked child gets new: the thread that held the old one stayed in the parent."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class Turn:
    """One thread at a time, as a context manager.

    Parameters
    ----------
    reentrant
        Whether the thread that has it may take it again.
    """

    def __init__(self, *, reentrant: bool = False) -> None:
        self._reentrant = reentrant
        self._lock: threading.Lock | threading.RLock
        self.renew()
        _TURNS.add(self)

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.RLock() if self._reentrant else threading.Lock()

    def renewed_in_child(self) -> None:
        """Hook for what a child has to remember."""

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()


def _renew_all() -> None:
    for turn in list(_TURNS):
        turn.renew()
        turn.renewed_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
