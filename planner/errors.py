"""What the planner raises on purpose."""

from __future__ import annotations

from hybrid.formats.errors import HybridError


class PlannerError(HybridError):
    """Base of what the planner raises."""


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
