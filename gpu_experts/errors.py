"""What devices and slots raise on purpose: what is wrong, both values, the remedy as ``hint``."""

from __future__ import annotations


class GpuExpertsError(Exception):
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


class ArgumentError(GpuExpertsError):
    """A device was described by values that cannot be."""


class ShapeError(GpuExpertsError):
    """A layout, a block or an argument of a call has another size or type than it must have."""


class SlotError(GpuExpertsError):
    """A slot was asked for that does not exist, is taken, is in use or holds nothing."""


class DeviceError(GpuExpertsError):
    """The device could not do what it was asked; what it holds may be lost."""


class DeviceMemoryError(DeviceError):
    """The device has less free memory than was asked for.

    Attributes
    ----------
    asked_bytes, free_bytes
        Both sides of the comparison; ``asked_bytes`` is None when the allocator did not say.
    """

    def __init__(
        self, message: str, *, asked_bytes: int | None, free_bytes: int, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.asked_bytes = asked_bytes
        self.free_bytes = free_bytes


class DeviceTimeoutError(DeviceError):
    """Something enqueued did not finish in the time it was given."""


class DeviceFailedError(DeviceError):
    """A copy or a kernel failed, or the device was closed before it ran."""
