"""Keeps the books of steps and layers: what they took, which experts they used.

Nobody waits for any of it: a layer's books are closed while the host waits for the next router.
"""

from __future__ import annotations

import time
from collections import deque

from hybrid.ledger.timeline import LayerRecord, Timeline
from hybrid.sharing.notes import Notes
from hybrid.sharing.partners import Predictor
from hybrid.sharing.routed import F32, Ids
from hybrid.sharing.usage import Usage
from planner.decide.director import Director


class Books:
    """The clock of forward passes, and what is learned from their layers.

    Parameters
    ----------
    timeline
        Collects what layers took.
    usage
        Counts which experts they used.
    lookahead
        Learns what routers chose; None where nobody looks ahead.
    notes
        Told when routing can be recorded no more.

    Attributes
    ----------
    before_s
        When what a layer waits for began: the pass, or the end of the layer before. None outside
        of a pass, and in one that is not timed any more.
    """

    def __init__(
        self, timeline: Timeline, usage: Usage, lookahead: Predictor | None, notes: Notes
    ) -> None:
        self.timeline, self.usage = timeline, usage
        self.before_s: float | None = None
        self._lookahead, self._notes = lookahead, notes
        self._prompt = False
        self._unsettled: deque[tuple[LayerRecord, Ids, F32]] = deque()

    def begin_step(self, prompt: bool, timed: bool) -> None:
        """Start the clock of a pass, of several tokens of a sequence or not."""
        self._prompt = prompt
        self.before_s = time.perf_counter() if timed else None

    def end_step(self, predicted_head_s: float) -> None:
        """Stop it, after the output head."""
        if self.before_s is not None:
            self.timeline.step(self._prompt, time.perf_counter() - self.before_s, predicted_head_s)
        self.before_s = None

    def is_prompt(self, tokens: int) -> bool:
        """Whether a layer of so many tokens is a prompt's: the pass knows, if there is one."""
        return self._prompt if self.before_s is not None else tokens > 1

    def enter(self, record: LayerRecord, ids: Ids, factors: F32) -> None:
        """Take a layer that is done, and what its router chose."""
        self._unsettled.append((record, ids.copy(), factors.copy()))
        self.before_s = record.joined_s

    def settle(self, director: Director) -> None:
        """Close the books of the layers that are done: count, time and learn."""
        while self._unsettled:
            record, ids, factors = self._unsettled.popleft()
            work = record.decision.work
            self.timeline.add(record, director.cost)
            self.usage.count(work.layer, record.tokens, work.loads)
            self._notes.say(self.usage.record(work.layer, ids, factors))
            if self._lookahead is not None:
                self._lookahead.learn(work.layer, ids)
        director.cache.learn()

    def stop(self) -> None:
        """Time the pass no more."""
        self.before_s = None

    def break_off(self) -> None:
        """Leave out the layers whose books are open, and time the pass no more."""
        self.before_s = None
        self._unsettled.clear()

    def forget(self) -> None:
        """Begin anew with what is counted, recorded and timed: a warm-up is nobody's session."""
        self.usage.forget()
        self.timeline.forget()
