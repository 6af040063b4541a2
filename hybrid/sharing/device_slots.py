"""What is on the device: which expert in which slot, what is on its way, and who decides it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gpu_experts.device import Device, Event
from gpu_experts.errors import SlotError
from gpu_experts.slots import SlotState, SlotTable
from hybrid.packed.experts import PackedLayer
from planner.decide.director import Admission, Director
from planner.decide.popularity import favourites


@dataclass(frozen=True)
class Opened:
    """A device with room for experts and nothing in it.

    Parameters
    ----------
    slots
        Which expert lies in which slot: none yet.
    director
        Decides over as many experts as the slots hold.
    """

    slots: SlotTable
    director: Director


class Residents:
    """Moves experts to a device and knows what is there.

    Parameters
    ----------
    device
        Where experts are copied to.
    layers
        Every MoE layer's experts.
    opened
        Its slots and who decides over them.

    Attributes
    ----------
    director
        Decides; its cache and the slots hold the same experts between two layers.
    """

    def __init__(self, device: Device, layers: Sequence[PackedLayer], opened: Opened) -> None:
        self.director = opened.director
        self._slots = opened.slots
        self._device = device
        self._layers = layers
        self._flying: dict[tuple[int, int], Event] = {}
        self._link_until_s = 0.0
        self._copy_s = opened.director.cost.experts.copy_s()

    def slots(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return where resident or staged experts lie."""
        return self._slots.slots(layer, experts)

    @property
    def staging(self) -> int:
        """How many experts can be staged at once when none is."""
        return self._slots.staging

    @property
    def free_staging(self) -> int:
        """How many experts can be staged at once."""
        return self._slots.free_staging

    def link_free_s(self, now_s: float) -> float:
        """When the link is predicted to be free, in seconds from now."""
        return max(0.0, self._link_until_s - now_s) if self._flying else 0.0

    def admit(self, admission: Admission) -> Event:
        """Copy an expert into a slot of its own, where it is pinned until it has arrived."""
        layer, expert, evicted = admission.layer, admission.expert, admission.evicted
        if evicted is not None:
            self._slots.release(layer, evicted)
        slot = self._slots.assign(layer, expert)
        event = self._copy(layer, expert, slot)
        self._flying[layer, expert] = event
        self.director.cache.pin(layer, expert)
        return event

    def stage(self, layer: int, expert: int) -> Event:
        """Copy an expert that is used once."""
        return self._copy(layer, expert, self._slots.stage(layer, expert))

    def unstage(self, layer: int, expert: int) -> None:
        """Give a staging slot back once its expert's compute is enqueued.

        What is copied there next waits for that compute on the device.
        """
        self._slots.ready(layer, expert)
        self._slots.release(layer, expert)

    def _copy(self, layer: int, expert: int, slot: int) -> Event:
        now_s = time.perf_counter()
        self._link_until_s = max(now_s, self._link_until_s) + self._copy_s
        return self._device.copy(
            self._layers[layer].blocks[expert], slot, f"layer {layer}: expert {expert} copied"
        )

    def land(self) -> None:
        """Note which copies have arrived: those experts may be evicted again.

        Raises
        ------
        DeviceFailedError
            When one of them failed.
        """
        while self._flying:
            (layer, expert), event = next(iter(self._flying.items()))
            if not event.done():  # nor are those behind it on the link
                break
            event.wait(0.0)
            self._slots.ready(layer, expert)
            self.director.cache.unpin(layer, expert)
            del self._flying[layer, expert]

    def settle(self, timeout_s: float) -> None:
        """Wait until everything that is on its way has arrived.

        Raises
        ------
        DeviceTimeoutError, DeviceFailedError
            When it does not.
        """
        for event in self._flying.values():
            event.wait(timeout_s)
        self.land()

    def recover(self, timeout_s: float) -> None:
        """Make sense again after a layer was broken off between two halves of a change.

        Raises
        ------
        DeviceTimeoutError, DeviceFailedError
            When the device does not finish what it was given.
        SlotError, CapacityError, AssertionError
            When it makes no sense any more: open the device anew.
        """
        self.settle(timeout_s)
        for layer, expert in list(self._slots):
            if self._slots.state(layer, expert) is SlotState.LOADING:  # never handed to the device
                self._slots.lost(layer, expert)
                if expert in self.director.cache.residency(layer):
                    self.director.lost(layer, expert)
        self.director.abandon()
        self.check_integrity()

    def warm(self, timeout_s: float) -> None:
        """Fill free slots with whom the policy values most, and wait until they are there."""
        cache = self.director.cache
        for layer in range(len(self._layers)):
            held = cache.residency(layer)
            free = cache.capacities[layer] - len(held)
            wanted = [expert for expert in favourites(cache, layer) if expert not in held]
            for expert in wanted[:free]:
                self.admit(Admission(layer, expert, cache.admit(layer, expert)))
        self.settle(timeout_s)

    def check_integrity(self) -> None:
        """Raise if slots and cache contradict themselves or each other, between two layers.

        Raises
        ------
        SlotError, CapacityError, AssertionError
            Saying how.
        """
        self.director.check_integrity()
        self._slots.check_integrity()
        held = {
            (layer, expert)
            for layer in range(len(self._layers))
            for expert in self.director.cache.residency(layer)
        }
        lost = [
            key
            for key in self._slots
            if self._slots.state(*key) is SlotState.LOADING and key not in self._flying
        ]
        if lost:
            raise SlotError(
                f"slots wait for copies that nobody makes, of (layer, expert) {lost[:4]}",
                hint="this is a defect of the executor: please report it",
            )
        if held != set(self._slots):
            raise SlotError(
                f"the cache holds {len(held)} experts and the slots {len(self._slots)}; they "
                f"differ in (layer, expert) {sorted(held ^ set(self._slots))[:4]}",
                hint="this is a defect of the executor: please report it",
            )


Settle = Callable[[int], Opened]
"""Opens the device for a number of slots, with nothing resident."""
