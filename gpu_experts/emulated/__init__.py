"""A device for machines without one: keeps every rule of the protocol, computes on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_experts.backend import Backend, StandIn

if TYPE_CHECKING:
    from gpu_experts.device import Device


def _open(number: int, stand_in: StandIn) -> Device:
    from gpu_experts.emulated.device import EmulatedDevice

    return EmulatedDevice(stand_in.memory_bytes, run=stand_in.run)


def _ran_out_of_memory(error: BaseException) -> bool:
    """Its own slots are told by :class:`DeviceMemoryError`; this is what torch says of dense
    layers."""
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


EMULATED = Backend(
    name="emulated",
    numbered=False,
    emulated=True,
    calibrated_as="emulated, exact",
    count=lambda: 1,
    open=_open,
    ran_out_of_memory=_ran_out_of_memory,
)
