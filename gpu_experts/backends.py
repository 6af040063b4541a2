"""Lists the backends, and finds one by what users, reports and calibrations call a device.

A backend is a folder beside this file that gives one :class:`~gpu_experts.backend.Backend`: a new
one is its folder, and its place in the list. Loads neither numpy nor torch.
"""

from __future__ import annotations

from gpu_experts.backend import Backend
from gpu_experts.cuda import CUDA
from gpu_experts.emulated import EMULATED

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CUDA, EMULATED)}
"""By name, in the order in which they are tried where no device is named."""


def find(name: str) -> tuple[Backend, int] | None:
    """Return backend and number of the device that users call ``name``; None when none does."""
    for backend in BACKENDS.values():
        number = backend.number(name)
        if number is not None:
            return backend, number
    return None


def choices() -> str:
    """Return what users may call devices, for messages."""
    return ", ".join(backend.names for backend in BACKENDS.values())


def by_number(number: int) -> str:
    """Return what users call a device of which they only say the number.

    It counts the devices of the first backend that has any, else of the first.
    """
    return (first_there() or next(iter(BACKENDS.values()))).called(number)


def first_there() -> Backend | None:
    """Return the first backend that has a device in this machine; None without one."""
    return next((b for b in BACKENDS.values() if not b.emulated and b.count()), None)


def emulation() -> Backend:
    """Return the backend that is taken where a device's memory is asked for and there is none."""
    return next(backend for backend in BACKENDS.values() if backend.emulated)


def name_of(device: str) -> str | None:
    """Return what users call the device that reports and calibrations call ``device``.

    None when that is the name of no backend's device.
    """
    for backend in BACKENDS.values():
        if backend.calibrated_as and device == backend.calibrated_as:
            return backend.name
    name = device.rpartition("(")[2].removesuffix(")")
    return None if find(name) is None else name


def is_emulated(device: str) -> bool:
    """Whether the device that reports and calibrations call ``device`` is an emulated one."""
    name = name_of(device)
    found = None if name is None else find(name)
    return found is not None and found[0].emulated
