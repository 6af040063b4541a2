"""Calibration points of everything but routed experts, looked up by step.

A step of one token takes the path of decode, whose time grows with the context; a step of more
is a prompt, whose time grows with its tokens. Between two points time is linear; a prompt beyond
the last grows as its time per token does, which attention's square term asks for. Where prompts
are computed in pieces, the points of whole pieces tell what a piece takes by itself, and the
longest prompt what each of its tokens takes more for each one that came before the piece. A head
of another size takes its part of the one that was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from planner.describe.estimate import Estimate, Source
from planner.describe.hardware import TermPoint
from planner.describe.terms import CALL, EXTRAS, HEAD, MIXER, SAMPLING, TEXT

_Key = tuple[str, str, int, str]
_OF_THE_HEAD = (HEAD, CALL, *EXTRAS)
_AS_LARGE = (HEAD, SAMPLING)
"""What takes as long as the head is large."""


class MeasuredTerms:
    """What a calibration found for one family of models.

    Parameters
    ----------
    points
        Of any families; those of others are left out.
    family
        The model's ``model_type``.
    lane
        Where dense weights are, ``cpu`` or ``gpu``. Text is written by the CPU in any case.
    """

    def __init__(self, points: Iterable[TermPoint], family: str, lane: str = "cpu") -> None:
        self._decode: defaultdict[_Key, list[TermPoint]] = defaultdict(list)
        self._prompt: defaultdict[_Key, list[TermPoint]] = defaultdict(list)
        for point in points:
            if point.family == family and (point.lane == lane or point.term == TEXT):
                table = self._decode if point.tokens == 1 else self._prompt
                table[point.term, point.kind, point.params, point.format].append(point)
        for found in self._decode.values():
            found.sort(key=lambda point: point.context)
        for found in self._prompt.values():
            found.sort(key=lambda point: point.tokens)

    def decode(self, term: str, kind: str, params: int, fmt: str, context: int) -> Estimate | None:
        """Return what one token takes with ``context`` tokens in the cache; None: not measured."""
        points, scale = _find(self._decode, (term, kind, params, fmt))
        if not points:
            return None
        return _scaled(_along([point.context for point in points], points, context), scale)

    def piece(self, fmt: str) -> int:
        """Return how many tokens of a prompt are computed at a time; 0 is all, or not known."""
        found = [
            point.piece
            for (term, _, _, of), points in self._prompt.items()
            for point in points
            if (term, of) == (MIXER, fmt)
        ]
        return max(found, default=0)

    def prompt(
        self, term: str, kind: str, params: int, fmt: str, tokens: int, past: int = 0
    ) -> Estimate | None:
        """Return what ``tokens`` of a prompt take, all at a time; None: not measured.

        ``past`` tokens of it lie in the cache already.
        """
        points, scale = _find(self._prompt, (term, kind, params, fmt))
        at_once = [point for point in points if not point.piece or point.tokens <= point.piece]
        if not at_once:
            return None
        found = _growing(at_once, tokens)
        if past:
            more = Estimate(tokens * past * _per_pair_s(points, at_once), Source.FITTED)
            found = replace(found + more, error=found.error)
        return _scaled(found, scale)


def _find(table: Mapping[_Key, list[TermPoint]], key: _Key) -> tuple[list[TermPoint], float]:
    """Points of ``key`` and what to multiply them by; a head's, of the one nearest in size."""
    if key in table:
        return table[key], 1.0
    term, kind, params, fmt = key
    others = [other for other in table if (other[0], other[1], other[3]) == (term, kind, fmt)]
    if term not in _OF_THE_HEAD or not params or not others:
        return [], 1.0
    nearest = min(others, key=lambda other: abs(math.log(max(1, other[2]) / params)))
    return table[nearest], params / nearest[2] if term in _AS_LARGE else 1.0


def _growing(points: list[TermPoint], tokens: int) -> Estimate:
    """Interpolate; beyond the last point the time per token grows on."""
    places = [point.tokens for point in points]
    if tokens <= places[-1] or len(points) < 2:
        return _along(places, points, tokens)
    far, last = places[-1], points[-1]
    value = tokens * (last.seconds / far + _growth_s(points) * (tokens - far))
    error = None if last.error is None else last.error * value / max(last.seconds, 1e-12)
    return Estimate(value, Source.FITTED, error)


def _growth_s(points: list[TermPoint]) -> float:
    """By how much each token more makes all tokens of a prompt longer, at the last two points."""
    if len(points) < 2:
        return 0.0
    near, far = points[-2:]
    grown_s = far.seconds / far.tokens - near.seconds / near.tokens
    return max(0.0, grown_s / (far.tokens - near.tokens))


def _per_pair_s(points: list[TermPoint], at_once: list[TermPoint]) -> float:
    """What a token takes more for each one before its piece.

    From the longest prompt of several pieces; without one from how whole pieces grow, half of
    whose tokens come before a token on average.
    """
    longest = points[-1]
    if longest is at_once[-1]:
        return 2 * _growth_s(at_once)
    cut = pieces(longest.tokens, longest.piece)
    alone_s = sum(_growing(at_once, tokens).value for tokens, _ in cut)
    pairs = sum(tokens * (context - tokens) for tokens, context in cut)
    return max(0.0, (longest.seconds - alone_s) / pairs)


def pieces(prompt: int, size: int) -> list[tuple[int, int]]:
    """Cut a prompt into pieces of ``size`` tokens, 0 for one: each one's tokens and context."""
    size = size or prompt
    return [
        (min(size, prompt - start), min(start + size, prompt)) for start in range(0, prompt, size)
    ]


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    if scale == 1.0:
        return estimate
    scaled = estimate * scale
    return Estimate(scaled.value, Source.FITTED, scaled.error)


def _along(places: list[int], points: list[TermPoint], at: int) -> Estimate:
    """Interpolate; before the first point as there, after the last along the last segment."""
    index = bisect_left(places, at)
    if index < len(points) and places[index] == at:
        return Estimate(points[index].seconds, Source.MEASURED, points[index].error)
    if index == 0 or len(points) == 1:
        return Estimate(points[0].seconds, Source.FITTED, points[0].error)
    inside = index < len(points)
    low, high = (index - 1, index) if inside else (-2, -1)
    share = (at - places[low]) / (places[high] - places[low])
    value = points[low].seconds + share * (points[high].seconds - points[low].seconds)
    errors = [e for e in (points[low].error, points[high].error) if e is not None]
    return Estimate(
        max(0.0, value),
        Source.MEASURED if inside else Source.FITTED,
        max(errors) if errors else None,
    )
