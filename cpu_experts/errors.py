"""Errors of the expert kernels' public boundary, beside those of formats and shapes."""

from __future__ import annotations

from hybrid.formats.errors import HybridError


class BackendError(HybridError):
    """The asked SIMD level does not exist or this processor cannot run it."""
