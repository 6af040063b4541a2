"""Errors of the expert kernels' public boundary."""

from __future__ import annotations


class CpuExpertsError(Exception):
    """Base class: ``message`` says what is wrong with both values, ``hint`` what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class FormatError(CpuExpertsError):
    """A quantization format is unknown or a packed buffer does not fit its shape."""


class ShapeError(CpuExpertsError):
    """Arrays handed to a kernel disagree in shape, type or memory layout."""


class BackendError(CpuExpertsError):
    """The asked SIMD level does not exist or this processor cannot run it."""
