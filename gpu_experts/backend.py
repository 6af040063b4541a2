"""What a backend is: one kind of device, as a folder of this package describes it.

Loads neither numpy nor torch; what needs them is called when a device is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpu_experts.device import Device, Run


class StandIn(NamedTuple):
    """What a device is made of by a backend that has neither memory nor kernels of its own."""

    memory_bytes: int
    """What slots may take of this machine's memory."""
    run: Run
    """Computes experts on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of device.

    Attributes
    ----------
    name
        What users call its first device.
    numbered
        Whether there may be several, called ``name:0``, ``name:1`` and so on.
    emulated
        Whether this machine's CPU and memory are the device: it is used only where it is asked
        for, or for its memory, and nothing of that is reserved for a driver.
    calibrated_as
        What reports and calibrations call its device where that is known beforehand. All others'
        names end in what users call them, in brackets: ``RTX 4060 (cuda:0)``.
    reserve_bytes
        What driver and kernels take of a device's memory; None is what the planner assumes.
    count
        Returns how many devices there are now.
    absent, remedy
        What is said where a device is asked for that is not there, with ``{count}`` for how many
        are, and what helps besides asking for none.
    open
        Opens the device of a number; raises
        :class:`~gpu_experts.errors.GpuExpertsError` where it cannot be used.
    ran_out_of_memory
        Tells whether an error of the framework, a compiler or the driver says that the device's
        memory ran out.
    software
        Returns the versions of what runs its kernels, for records; None is what is missing.
    """

    name: str
    numbered: bool = True
    emulated: bool = False
    calibrated_as: str = ""
    reserve_bytes: int | None = None
    absent: str = ""
    remedy: str = ""
    count: Callable[[], int]
    open: Callable[[int, StandIn], Device]
    ran_out_of_memory: Callable[[BaseException], bool]
    software: Callable[[], Mapping[str, str | None]] = dict

    @property
    def names(self) -> str:
        """What users may call its devices, for messages."""
        return f"{self.name}, {self.name}:N" if self.numbered else self.name

    def number(self, name: str) -> int | None:
        """Return the number of the device that users call ``name``; None when it is no such."""
        kind, colon, number = name.partition(":")
        if kind != self.name or (colon and not (self.numbered and number.isdecimal())):
            return None
        return int(number or 0)

    def called(self, number: int) -> str:
        """Return what users call the device of a number, in full."""
        return f"{self.name}:{number}" if self.numbered else self.name
