"""Defines the values that decisions start from: an estimated duration, and a layer's work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from planner.errors import WorkError


class Source(StrEnum):
    """Where a number comes from, the most trustworthy first."""

    MEASURED = "measured"
    FITTED = "fitted"
    ANALYTIC = "analytic"
    ASSUMED = "assumed"

    @property
    def rank(self) -> int:
        """Position from the most trustworthy (0) to the least."""
        return _RANK[self]


_RANK = {source: rank for rank, source in enumerate(Source)}


def weakest(*sources: Source) -> Source:
    """Return the least trustworthy of ``sources``: a sum is no better than its worst term."""
    return max(sources, key=lambda source: source.rank)


@dataclass(frozen=True)
class Estimate:
    """A duration in seconds that says where it comes from.

    Parameters
    ----------
    value
        Seconds; finite and not negative.
    source
        Where the value comes from.
    error
        One standard deviation in seconds, or None when nobody knows it.
    """

    value: float
    source: Source
    error: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise WorkError(
                f"a duration must be finite and not negative, got {self.value!r} s",
                hint="check the hardware description it was derived from",
            )

    def __add__(self, other: Estimate) -> Estimate:
        """Sum of two durations: the weaker source, independent errors in quadrature."""
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return Estimate(self.value + other.value, weakest(self.source, other.source), error)

    def __mul__(self, factor: float) -> Estimate:
        """Return this duration ``factor`` times over; its error grows with it."""
        error = None if self.error is None else self.error * factor
        return Estimate(self.value * factor, self.source, error)

    __rmul__ = __mul__


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer's step, as ids and loads only.

    Parameters
    ----------
    layer
        Index among the model's MoE layers.
    loads
        ``(expert id, tokens)`` pairs, ids strictly ascending, every load positive.
    gpu_free_s
        When the GPU is free (attention and the shared expert run there first).
    link_free_s
        When the link is free (a prefetch may be in flight).

    Raises
    ------
    WorkError
        When ids are not ascending, a load is not positive, or a time is negative.
    """

    layer: int
    loads: tuple[tuple[int, int], ...]
    gpu_free_s: float = 0.0
    link_free_s: float = 0.0

    def __post_init__(self) -> None:
        previous = -1
        for expert, load in self.loads:
            if expert <= previous:
                raise WorkError(
                    f"layer {self.layer}: expert {expert} follows expert {previous}",
                    hint="list each activated expert once, ids ascending from 0",
                )
            if load <= 0:
                raise WorkError(
                    f"layer {self.layer}: expert {expert} has load {load}",
                    hint="leave experts without tokens out of the work",
                )
            previous = expert
        for value in (self.gpu_free_s, self.link_free_s):
            if not 0 <= value < math.inf:
                name = "gpu_free_s" if value is self.gpu_free_s else "link_free_s"
                raise WorkError(
                    f"layer {self.layer}: {name} is {value!r}",
                    hint="times are seconds from the start of the step, at least 0",
                )

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Activated experts, ascending."""
        return tuple(expert for expert, _ in self.loads)
