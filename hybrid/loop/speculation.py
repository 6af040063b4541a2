"""Decides how many tokens to draft, and learns whether that pays.

A step that checks ``n`` drafted tokens computes ``n + 1``, and yields one token more than it
accepts. The draft that is made maximises

    (1 + E(n)) / t(n + 1)   over n = 0, 1, ..., MOST_DRAFTED

where ``E(n)`` is how many of ``n`` tokens are expected to be accepted and ``t(T)`` how long a step
of ``T`` tokens takes. Both are learned from every step: what would have been drafted is compared
with what comes also where nothing is drafted, and steps are timed. Before steps of ``T`` tokens
were seen they are taken for what some took that computed the same token ``T`` times. What drafts
may lose by that is limited: an account has what they gained so far and a hundredth of the time, and
a draft is made only where it can pay for what the step takes beyond one of a single token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hybrid.ask.speculate import MOST_DRAFTED, Speculate
from hybrid.ledger.metrics import Speculated
from hybrid.loop.lookup import LONGEST, Lookup

_SHARE = 0.01
"""Part of the time that drafts may lose."""
_CREDIT_STEPS, _SAVED_STEPS = 2, 50
"""Steps whose time they may lose at first, and of whose gain they may lose again."""
_MARGIN = 1.1
"""How much faster than single tokens a draft has to promise to be."""
_NEW, _NEW_SINGLE = 0.3, 0.1
"""Weight of the last step's time in what is known of steps like it."""
_UNLIKELY = 0.05
"""Chance below which no further token is drafted."""
_FRESH = 64
"""Steps for which what is expected of steps is kept, unless one of several tokens comes."""
_OUTLIER = 3.0
"""A step that takes longer than usual by more than this was disturbed."""
_HALF_LIFE = 512
"""Steps after which half of what was found of steps of several tokens is doubted."""
_MEMORY = 64
"""Tokens that acceptance is learned from; older ones fade."""


class Chances:
    """How often a token that the lookup expects comes, by how much of the text reads alike."""

    def __init__(self) -> None:
        self._came = [0.5] * (LONGEST + 1)
        self._seen = [1.0] * (LONGEST + 1)

    def learn(self, alike: int, came: bool) -> None:
        """Note whether an expected token came."""
        if self._seen[alike] >= _MEMORY:
            self._came[alike] *= 1 - 1 / _MEMORY
            self._seen[alike] *= 1 - 1 / _MEMORY
        self._came[alike] += came
        self._seen[alike] += 1

    def of(self, alike: int) -> float:
        """Return the chance that an expected token comes."""
        at = min(alike, LONGEST)
        return self._came[at] / self._seen[at]


class StepSeconds:
    """How long steps take, by how many tokens they compute.

    A step of ``T`` tokens is taken for ``least(T) + (T - 1) * more``: what was timed beforehand,
    moved with what single tokens take, and what other experts and disturbances were seen to add
    for each further token. All of it is trusted the less the longer no such step was seen, so that
    what a disturbance showed does not end drafts for good.

    Parameters
    ----------
    least
        Seconds of steps that were timed beforehand, of few different experts: by tokens, with that
        of 1. Without any, a step is first taken for one of a single token.

    Attributes
    ----------
    single
        Seconds of a step of one token; None before one was seen.
    """

    def __init__(self, least: Mapping[int, float] | None = None) -> None:
        self.single: float | None = None
        self._least = dict(least or {})
        self._more_s = 0.0
        self._steps = self._learned = 0
        self._further_s: list[float] = []

    def learn(self, tokens: int, seconds: float) -> None:
        """Take what a step took; the first one is of a single token."""
        self._steps += 1
        if tokens > 1 or self._steps % _FRESH == 0:
            self._further_s = []
        if self.single is None:
            self.single = seconds
            return
        known_s = self.of(tokens)
        more_s = min(seconds, _OUTLIER * known_s) - known_s
        if tokens == 1:
            self.single += _NEW_SINGLE * more_s
        else:
            self._further_s = []
            beyond_s = known_s + _NEW * more_s - self.single - self._least_more(tokens)
            self._more_s = beyond_s / (tokens - 1)
            self._learned = self._steps

    def of(self, tokens: int) -> float:
        """Return what a step of so many ``tokens`` is expected to take."""
        assert self.single is not None
        return self.single + self.further[tokens - 1]

    @property
    def further(self) -> list[float]:
        """Seconds that 0, 1, 2 ... further tokens are expected to add to those of one."""
        if not self._further_s:
            trust: float = 0.5 ** ((self._steps - self._learned) / _HALF_LIFE)
            self._further_s = [
                trust * max(0.0, self._least_more(tokens + 1) + tokens * self._more_s)
                for tokens in range(MOST_DRAFTED + 1)
            ]
        return self._further_s

    def _least_more(self, tokens: int) -> float:
        """Return what the step took beyond one of a single token, before anything was generated."""
        more_s, before = 0.0, 1
        for seen in sorted(self._least):
            more_then_s = max(more_s, self._least[seen] - self._least[1])
            if seen >= tokens:
                share = (tokens - before) / (seen - before) if seen > before else 1.0
                return more_s + share * (more_then_s - more_s)
            more_s, before = more_then_s, seen
        return more_s


class Speculation:
    """What a session knows of drafts: it makes those of each call, and learns from them.

    Parameters
    ----------
    asked
        What the user asks for.
    least
        See :class:`StepSeconds`.
    """

    def __init__(self, asked: Speculate, least: Mapping[int, float] | None = None) -> None:
        self.asked = asked
        self.seconds = StepSeconds(least)
        self.chances = Chances()
        self._saved_s = 0.0
        self._spent_s = 0.0

    def begin(self, ids: Iterable[int]) -> Drafts | None:
        """Return the drafts of a call after a prompt; None where there are to be none."""
        return None if self.asked.off else Drafts(self, ids)

    def count(self, alike: int, room: int) -> int:
        """Return how many tokens to draft, ``room`` at most, after so much that reads alike."""
        most = min(MOST_DRAFTED, room)
        if self.asked.count is not None:
            return min(self.asked.count, most)
        single_s = self.seconds.single
        if single_s is None:
            return 0
        expected, chance, best, count = 1.0, 1.0, _MARGIN / single_s, 0
        further_s = self.seconds.further
        can_lose_s = self._saved_s + _CREDIT_STEPS * single_s + _SHARE * self._spent_s
        for tokens in range(1, most + 1):
            chance *= self.chances.of(alike + tokens - 1)
            if chance < _UNLIKELY or further_s[tokens] > can_lose_s:
                break
            expected += chance
            rate = expected / (single_s + further_s[tokens])
            if rate > best:
                best, count = rate, tokens
        return count

    def learn(self, tokens: int, new: int, seconds: float) -> float:
        """Take what a step of so many ``tokens`` took, of which so many ``new`` ones came.

        Returns the seconds that it gained over as many steps of a single token.
        """
        self._spent_s += seconds
        single_s = self.seconds.single
        if tokens == 1 or single_s is not None:
            self.seconds.learn(tokens, seconds)
        if tokens == 1 or single_s is None:
            return 0.0
        gain_s = new * single_s - seconds
        self._saved_s = min(self._saved_s + gain_s, _SAVED_STEPS * single_s)
        return gain_s


class Drafts:
    """The drafts of one call.

    Parameters
    ----------
    speculation
        What decides, and learns.
    ids
        The prompt.

    Attributes
    ----------
    refused
        Why there can be none; None where there can.
    """

    def __init__(self, speculation: Speculation, ids: Iterable[int]) -> None:
        self.refused: str | None = None
        self._speculation = speculation
        self._lookup = Lookup(ids)
        self._drafted = self._accepted = self._steps = 0
        self._gained_s = 0.0
        self._open: tuple[int, int, float] | None = None

    def add(self, token: int) -> None:
        """Take the token that came."""
        expected = self._lookup.next
        if expected is not None:
            self._speculation.chances.learn(self._lookup.alike, token == expected)
        self._lookup.add(token)

    def propose(self, room: int) -> list[int]:
        """Return the tokens to check in the next step, ``room`` at most."""
        if self.refused is not None or not self._lookup.alike or room < 1:
            return []
        return self._lookup.draft(self._speculation.count(self._lookup.alike, room))

    def took(self, tokens: int, new: int, seconds: float) -> None:
        """Learn from a step of so many ``tokens`` and ``new`` ones that came of it.

        What the next single token takes longer than others is a draft's, too: a cache may have to
        change its layout for it.
        """
        single_s = self._speculation.seconds.single
        if self._open is not None:
            late_s = max(0.0, seconds - single_s) if tokens == 1 and single_s is not None else 0.0
            self._close(late_s)
            seconds -= late_s
        if tokens > 1:
            self._open = (tokens, new, seconds)
        else:
            self._speculation.learn(tokens, new, seconds)

    def summary(self) -> Speculated:
        """Return what came of it."""
        self._close(0.0)
        return Speculated(
            asked=str(self._speculation.asked),
            refused=self.refused,
            drafted=self._drafted,
            accepted=self._accepted,
            steps=self._steps,
            gained_s=self._gained_s,
        )

    def _close(self, late_s: float) -> None:
        """Count the step that was drafted last."""
        if self._open is not None:
            tokens, new, seconds = self._open
            self._open = None
            self._drafted += tokens - 1
            self._accepted += new - 1
            self._steps += 1
            self._gained_s += self._speculation.learn(tokens, new, seconds + late_s)
