"""Decides how many tokens to draft, and learns whether that pays.

A step that checks ``n`` drafted tokens computes ``n + 1``, and yields one token more than it
accepts. The draft that is made maximises

    (1 + E(n)) / t(n + 1)   over n = 0, 1, ..., MOST_DRAFTED

where ``E(n)`` is how many of ``n`` tokens are expected to be accepted and ``t(T)`` how long a step
of ``T`` tokens takes. Both are learned from every step: what would have been drafted is compared
with what comes also where nothing is drafted, and steps are timed. Before steps of ``T`` tokens
were seen they are taken for as short as they can be. What drafts may lose by that is limited: an
account has what they gained so far and a hundredth of the time, and a draft is made only where it
can pay for what the step takes beyond one of a single token.
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
_MARGIN = 1.02
"""How much faster than single tokens a draft has to promise to be."""
_NEW, _NEW_SINGLE = 0.3, 0.1
"""Weight of the last step's time in what is known of steps like it."""
_OUTLIER = 3.0
"""A step that takes longer than usual by more than this was disturbed."""
_HALF_LIFE = 512
"""Steps after which half of what was found of steps of so many tokens is doubted."""
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

    Parameters
    ----------
    least
        Seconds of steps that were timed beforehand, of few different experts: by tokens, with that
        of 1.
    """

    def __init__(self, least: Mapping[int, float] | None = None) -> None:
        self._least = dict(least or {})
        self._seconds: dict[int, float] = {}
        self._learned: dict[int, int] = {}
        self._steps = 0

    @property
    def single(self) -> float | None:
        """Of one token; None before one was seen."""
        return self._seconds.get(1)

    def learn(self, tokens: int, seconds: float) -> None:
        """Take what a step took."""
        self._steps += 1
        known = self._seconds.get(tokens)
        if known is None:
            self._seconds[tokens] = seconds
        else:
            weight = _NEW_SINGLE if tokens == 1 else _NEW
            known += weight * (min(seconds, _OUTLIER * known) - known)
            self._seconds[tokens] = known
        self._learned[tokens] = self._steps

    def of(self, tokens: int) -> float:
        """Return what a step of so many ``tokens`` is expected to take; the first was learned."""
        least = self._least_of(tokens)
        known = max((seen for seen in self._seconds if 1 < seen <= tokens), default=None)
        if known is None:
            return least
        more = self._seconds[known] - self._least_of(known)
        doubt: float = 0.5 ** ((self._steps - self._learned[known]) / _HALF_LIFE)
        return max(self._seconds[1], least + more * doubt)

    def _least_of(self, tokens: int) -> float:
        """Return what the step takes if it computes no more experts than one of a single token."""
        more, before = 0.0, 1
        if 1 in self._least:
            for seen in sorted(self._least):
                more_then = self._least[seen] - self._least[1]
                if seen >= tokens:
                    share = (tokens - before) / (seen - before) if seen > before else 1.0
                    more += share * (more_then - more)
                    break
                more, before = more_then, seen
        return self._seconds[1] + max(0.0, more)


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
        can_lose_s = self._saved_s + _CREDIT_STEPS * single_s + _SHARE * self._spent_s
        for tokens in range(1, most + 1):
            chance *= self.chances.of(alike + tokens - 1)
            expected += chance
            step_s = self.seconds.of(tokens + 1)
            if step_s - single_s > can_lose_s:
                break
            if expected / step_s > best:
                best, count = expected / step_s, tokens
        return count

    def learn(self, tokens: int, new: int, seconds: float) -> float:
        """Take what a step of so many ``tokens`` took, of which so many ``new`` ones came.

        Returns the seconds that it gained over as many steps of a single token.
        """
        self.seconds.learn(tokens, seconds)
        self._spent_s += seconds
        single_s = self.seconds.single
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
