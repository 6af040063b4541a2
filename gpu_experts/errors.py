"""What devices and slots raise on purpose."""

from __future__ import annotations

from hybrid.formats.errors import HybridError


class GpuExpertsError(HybridError):
    """Base of what this package raises, which callers answer by computing on the CPU."""


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
