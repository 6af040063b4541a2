"""Keeps a device in use for as long as it can be: with fewer slots, opened anew, or given up."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_experts.device import Device
from gpu_experts.errors import DeviceError, DeviceMemoryError, GpuExpertsError
from hybrid.errors import bare, first_line
from hybrid.formats.notes import Note
from hybrid.packed.experts import PackedLayer
from hybrid.sharing.device_slots import MakeDirector, Residents, open_slots
from hybrid.sharing.notes import Notes
from planner.errors import PlannerError

SHRINK = 0.75
"""Share of the slots that is kept when the device's memory runs out."""
TIMEOUT_S = 30.0
"""A copy or a kernel that takes longer is given up: none takes a second."""


class DeviceGuard:
    """A device that experts are copied to, and what is done when something goes wrong with it.

    Parameters
    ----------
    device
        Opened here.
    layers
        Every MoE layer's experts.
    make_director
        Makes who decides, whenever the device is opened.
    slots
        How many residents to begin with, or fewer where its memory has no room for them.
    timeout_s
        How long to wait for it.

    Attributes
    ----------
    device
        None when it was given up: everything runs on the CPU then.
    residents
        What is on it.
    slot_count
        How many experts can be resident.
    notes
        What did not go as planned, for the report.

    Raises
    ------
    DeviceMemoryError
        When there is not even room for staging.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[PackedLayer],
        make_director: MakeDirector,
        slots: int,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.device: Device | None = device
        self.layers = layers
        self.timeout_s = timeout_s
        self.notes = Notes()
        self._make_director = make_director
        self.slot_count = slots
        self.residents: Residents
        error = self._open_most(device)
        if error is not None:
            reason = f"the device has less memory than was planned with ({first_line(error)})"
            self._say_shrunk(slots, reason, "give the model less vram")

    def _open_most(self, device: Device) -> DeviceMemoryError | None:
        """Open the device for ``slot_count`` slots, or for as many as its memory has room for.

        Returns why it was not opened for more.

        Raises
        ------
        DeviceMemoryError
            When it cannot be opened for any.
        """
        error = None
        while True:
            try:
                self._open(device)
                return error
            except DeviceMemoryError as raised:
                error = bare(raised)
            # Not inside the handler: what the error's frames held is free by now.
            if not self.slot_count:
                raise error
            self.slot_count = int(self.slot_count * SHRINK)

    def _open(self, device: Device) -> None:
        self.residents = open_slots(device, self.layers, self._make_director, self.slot_count)

    def reopen(self) -> None:
        """Begin with nothing resident, between two layers; what was learned about experts stays."""
        assert self.device is not None
        self._open(self.device)

    def warm(self) -> None:
        """Fill free slots with whom the cache's policy values most."""
        if self.device is None:
            return
        try:
            self.residents.warm(self.timeout_s)
            return
        except GpuExpertsError as raised:
            error = bare(raised)
        self._give_up(self.device, error)

    def answer(self, error: Exception) -> None:
        """Go on after a layer failed: with fewer slots where memory ran out, or without it."""
        if isinstance(error, DeviceMemoryError):
            self.shrink(error)
        elif self.device is not None:
            self._give_up(self.device, error)

    def shrink(self, error: Exception) -> None:
        """Go on with fewer slots after the device's memory ran out; with none, without it."""
        device, before = self.device, self.slot_count
        if device is None:
            return
        self.slot_count = int(before * SHRINK)
        if before:
            try:
                error = self._open_most(device) or error
            except DeviceMemoryError as again:
                error = bare(again)
        if not self.slot_count:
            self._give_up(device, error)
            return
        self._say_shrunk(
            before,
            f"{device.name} ran out of memory ({first_line(error)})",
            "give the model less vram, or a shorter context, from the start",
        )

    def _say_shrunk(self, before: int, reason: str, remedy: str) -> None:
        what = f"{self.slot_count} expert slots instead of {before}"
        self.notes.say(Note(what, reason, remedy))

    def recover(self) -> None:
        """Make sense again after something broke a layer off; forget everything if need be."""
        try:
            self.residents.recover(self.timeout_s)
        except DeviceError as error:
            if self.device is not None:
                self._give_up(self.device, error)
        except (AssertionError, GpuExpertsError, PlannerError):
            # It was broken off between two halves of a change.
            self.reopen()

    def _give_up(self, device: Device, error: Exception) -> None:
        """Go on without the device."""
        self.device = None
        what = f"all experts on the CPU since {device.name} failed"
        remedy = "load the model again to try the device again"
        self.notes.say(Note(what, first_line(error), remedy))
        try:
            device.close()
        except GpuExpertsError as late:
            reason, remedy = first_line(late), "end this process to free its memory"
            self.notes.say(Note(f"closing {device.name}", reason, remedy))

    def close(self) -> None:
        """Give the device's memory back; everything runs on the CPU from now on."""
        if self.device is not None:
            device, self.device = self.device, None
            device.close()
