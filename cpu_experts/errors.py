"""Errors of the expert kernels' public boundary."""

from __future__ import annotations

from hybrid.formats.errors import FormatError, HybridError, ShapeError

__all__ = ["BackendError", "FormatError", "ShapeError"]


class BackendError(HybridError):
    """The asked SIMD level does not exist or this processor cannot run it."""
