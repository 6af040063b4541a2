"""What the planner raises on purpose: what is wrong, both values, and the remedy as ``hint``."""

from __future__ import annotations


class PlannerError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    message
        What is wrong, naming the thing and both values.
    hint
        What to do about it; the command line prints it on its own line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class SpecError(PlannerError):
    """A model, hardware or experiment description lacks a value or has one that cannot be."""


class WorkError(PlannerError):
    """A layer's work, or a plan for it, contradicts itself."""


class CostError(PlannerError):
    """A duration was asked for that the hardware description gives no data for."""


class TraceError(PlannerError):
    """A routing trace cannot be read or does not belong to the model."""


class CapacityError(PlannerError):
    """A cache was asked to hold more than it has room for, or to evict what is pinned."""
