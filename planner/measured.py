"""Calibration points of everything but routed experts, looked up by step.

A step of one token takes the path of decode, whose time grows with the context; a step of more
is a prompt, whose time grows with its tokens. Between two points time is linear; a prompt beyond
the last grows as its time per token does, which attention's square term asks for. A head of
another size takes its part of the one that was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping

from planner.hardware import TermPoint
from planner.spec import Estimate, Source

_Key = tuple[str, str, int, str]
_OF_THE_HEAD = ("head", "call")


class MeasuredTerms:
    """What a calibration found for one family of models.

    Parameters
    ----------
    points
        Of any families; those of others are left out.
    family
        The model's ``model_type``.
    """

    def __init__(self, points: Iterable[TermPoint], family: str) -> None:
        self._decode: defaultdict[_Key, list[TermPoint]] = defaultdict(list)
        self._prompt: defaultdict[_Key, list[TermPoint]] = defaultdict(list)
        for point in points:
            if point.family == family:
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

    def prompt(self, term: str, kind: str, params: int, fmt: str, tokens: int) -> Estimate | None:
        """Return what a prompt of ``tokens`` takes, alone in the cache; None: not measured."""
        points, scale = _find(self._prompt, (term, kind, params, fmt))
        if not points:
            return None
        places = [point.tokens for point in points]
        if tokens <= places[-1] or len(points) < 2:
            return _scaled(_along(places, points, tokens), scale)
        (near, far), last = places[-2:], points[-1]
        per_token_s = last.seconds / far
        slope_s = max(0.0, (per_token_s - points[-2].seconds / near) / (far - near))
        value = tokens * (per_token_s + slope_s * (tokens - far))
        error = None if last.error is None else last.error * value / max(last.seconds, 1e-12)
        return _scaled(Estimate(value, Source.FITTED, error), scale)


def _find(table: Mapping[_Key, list[TermPoint]], key: _Key) -> tuple[list[TermPoint], float]:
    """Points of ``key`` and what to multiply them by; a head's, of the one nearest in size."""
    if key in table:
        return table[key], 1.0
    term, kind, params, fmt = key
    others = [other for other in table if (other[0], other[1], other[3]) == (term, kind, fmt)]
    if term not in _OF_THE_HEAD or not params or not others:
        return [], 1.0
    nearest = min(others, key=lambda other: abs(math.log(max(1, other[2]) / params)))
    return table[nearest], params / nearest[2] if term == "head" else 1.0


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
