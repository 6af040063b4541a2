"""Compares a calibration with a model: which of its parts were measured, and what would help."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.machine import calibrations
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.describe.terms import MIXER

UNMEASURED = 0.3
"""Relative error that predictions of unmeasured parts state: rates and other formats tell how long
they take no better than that."""


@dataclass(frozen=True)
class Coverage:
    """Which parts of a model were measured in its formats.

    Attributes
    ----------
    experts
        Whether its routed experts' shape was.
    parts
        Whether everything else was.
    like
        Dense formats that everything else was measured in.
    disturbed
        Part of the processors' time that other programs took meanwhile, 0 where it was little.
    """

    experts: bool
    parts: bool
    like: tuple[str, ...]
    disturbed: float

    @classmethod
    def of(cls, spec: HardwareSpec, model: ModelSpec, experts: str, dense: str) -> Coverage:
        """Look in a calibration for a model with experts and dense weights in these formats."""
        shape = model.experts
        points = [
            point
            for point in spec.points
            if (point.hidden, point.intermediate, point.format)
            == (shape.hidden, shape.intermediate, experts)
            and point.lane == "cpu"
        ]
        mixers = {layer.mixer.params for layer in model.layers}
        measured: dict[str, set[int]] = {}
        terms = [term for term in spec.terms if term.family == model.family]
        for term in terms:
            if term.term == MIXER and term.lane == "cpu":
                measured.setdefault(term.format, set()).add(term.params)
        like = [fmt for fmt, params in measured.items() if mixers <= params]
        own = [term for term in terms if term.format == dense and dense in like]
        return cls(
            experts=bool(points),
            parts=dense in like,
            like=tuple(sorted(like)),
            disturbed=calibrations.disturbed([*points, *own]),
        )

    @property
    def whole(self) -> bool:
        """Whether the model was measured as it is."""
        return self.experts and self.parts

    def __str__(self) -> str:
        if self.experts and self.parts:
            return "a calibration of this shape in these formats"
        missing = [] if self.experts else ["its experts"]
        if not self.parts:
            others = f" (measured in {', '.join(self.like)} only)" if self.like else ""
            missing.append(f"attention and dense layers{others}")
        parts = " and ".join(missing)
        return (
            f"rates of this machine for {parts}, \u00b1 {UNMEASURED:.0%}, as they were not measured"
        )

    def advice(self, command: str) -> str:
        """Say what was predicted from, and what ``command`` would make better."""
        if not self.whole:
            return f"from {self}; {command} measures them"
        if self.disturbed:
            return (
                f"from {self}, while other programs used {self.disturbed:.0%} of the processors; "
                f"{command} measures again"
            )
        return f"from {self}"
