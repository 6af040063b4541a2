"""Caches that know the future: how well any policy could have done on a recorded trace.

An oracle is an ordinary policy that was shown the whole trace first. It must then observe the
same trace, step by step, in every layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.decide.policy import Ids, Policy, Values
from planner.errors import CapacityError, TraceError


class _Oracle(Policy):
    """Counts the steps each layer has seen, and checks that they are the trace's.

    Parameters
    ----------
    trace
        Ids chosen at every step, ``[T, L, A]``.
    """

    def __init__(self, trace: NDArray[np.integer], experts: int) -> None:
        super().__init__(trace.shape[1], experts)
        self._trace = trace
        self._step = np.full(trace.shape[1], -1)

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        self._step[layers] += 1
        step = self._step[layers]
        if (step >= len(self._trace)).any() or (self._trace[step, layers] != ids).any():
            raise TraceError(
                f"the {self.name} oracle saw another choice at step {int(step[0])} than its "
                "trace has",
                hint="replay the trace it was made from, once, from the first step",
            )


class Belady(_Oracle):
    """Keep what is used again soonest (Belady, 1966): no policy has more hits.

    That holds for caches that only take an expert when it is used. ``ahead[t, l, e]`` is the first
    step after t that uses expert e; evicting the farthest is evicting the least ``-ahead``.
    """

    name = "belady"

    def __init__(self, trace: NDArray[np.integer], experts: int) -> None:
        super().__init__(trace, experts)
        steps, layers, _ = trace.shape
        rows = np.arange(layers)[:, None]
        self._ahead = np.empty((steps, layers, experts), dtype=np.int32)
        ahead = np.full((layers, experts), steps, dtype=np.int32)
        for step in range(steps - 1, -1, -1):
            self._ahead[step] = ahead
            ahead[rows, trace[step]] = step

    def value(self, layers: Ids) -> Values:
        value: Values = -self._ahead[self._step[layers], layers].astype(np.float64)
        return value


class SCH(_Oracle):
    """Keep what is used most in the next ``window`` steps (segment cache best, arXiv 2505.16056).

    Raises
    ------
    CapacityError
        When ``window`` is below 1.
    """

    name = "sch"

    def __init__(self, trace: NDArray[np.integer], experts: int, window: int = 16) -> None:
        super().__init__(trace, experts)
        if window < 1:
            raise CapacityError(
                f"the SCH oracle looks {window} steps ahead", hint="look ahead at least 1 step"
            )
        steps, layers, _ = trace.shape
        rows = np.arange(layers)[:, None]
        # Uses before each step; the last row is repeated for the windows that reach past it.
        before = np.zeros((steps + 1, layers, experts), dtype=np.int32)
        for step in range(steps):
            before[step + 1] = before[step]
            before[step + 1, rows, trace[step]] += 1
        self._before = before
        self._window = window

    def value(self, layers: Ids) -> Values:
        now = self._step[layers] + 1
        then = np.minimum(now + self._window, len(self._trace))
        value: Values = (self._before[then, layers] - self._before[now, layers]).astype(np.float64)
        return value
