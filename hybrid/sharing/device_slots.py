"""Moves experts into a device's slots, and knows what is on its way there.

The director's cache is the book of who is resident and in which slot. What is kept here is the
device's: the events of copies on their way, when the link will be free, and the few slots behind
the cache's, for experts that are copied, used once and not kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from gpu_experts.device import Device, Event
from gpu_experts.errors import SlotError
from hybrid.packed.experts import PackedLayer
from planner.decide.director import Admission, Director
from planner.foretell.memory import STAGING

MakeDirector = Callable[[int], Director]
"""Makes who decides over a number of slots, with nothing resident."""


def open_slots(
    device: Device, layers: Sequence[PackedLayer], make_director: MakeDirector, slots: int
) -> Residents:
    """Open ``device`` for ``slots`` resident experts of ``layers``; none is there yet.

    Raises
    ------
    DeviceMemoryError
        When it has less memory.
    """
    block = layers[0].shape.with_stride(layers[0].blocks.shape[1])
    device.open(block, slots + STAGING)
    return Residents(device, layers, make_director(slots))


class Residents:
    """The experts on a device.

    Parameters
    ----------
    device
        Open, with slots for the cache's capacities and ``STAGING`` more behind them.
    layers
        Every MoE layer's experts.
    director
        Decides who is resident.
    """

    def __init__(self, device: Device, layers: Sequence[PackedLayer], director: Director) -> None:
        self.director = director
        self._device = device
        self._layers = layers
        self._flying: dict[tuple[int, int], Event] = {}
        self._staged: dict[tuple[int, int], int] = {}
        kept = sum(director.cache.capacities)
        self._free_staging = deque(range(kept, kept + STAGING))
        self._link_until_s = 0.0
        self._copy_s = director.cost.experts.copy_s()

    def slots(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return where resident or staged experts lie."""
        held, staged = self.director.cache.slots(layer), self._staged
        if not staged:
            return [held[expert] for expert in experts]
        return [held[expert] if expert in held else staged[layer, expert] for expert in experts]

    @property
    def free_staging(self) -> int:
        """How many experts can be staged at once."""
        return len(self._free_staging)

    def link_free_s(self, now_s: float) -> float:
        """When the link is predicted to be free, in seconds from now."""
        return max(0.0, self._link_until_s - now_s) if self._flying else 0.0

    def admit(self, admission: Admission) -> Event:
        """Copy an expert into the slot that the cache gave it, and pin it until it has landed."""
        layer, expert = admission.layer, admission.expert
        cache = self.director.cache
        event = self._copy(layer, expert, cache.slots(layer)[expert])
        self._flying[layer, expert] = event
        cache.pin(layer, expert)
        return event

    def stage(self, layer: int, expert: int) -> Event:
        """Copy an expert that is used once.

        Raises
        ------
        SlotError
            When no staging slot is free.
        """
        if not self._free_staging:
            raise SlotError(
                f"no free staging slot for layer {layer}, expert {expert}: all {STAGING} are taken",
                hint="unstage the experts whose compute was enqueued",
            )
        slot = self._staged[layer, expert] = self._free_staging.popleft()
        return self._copy(layer, expert, slot)

    def unstage(self, layer: int, expert: int) -> None:
        """Give a staging slot back once its expert's compute is enqueued.

        What is copied there next waits for that compute on the device.
        """
        self._free_staging.append(self._staged.pop((layer, expert)))

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
        cache = self.director.cache
        while self._flying:
            (layer, expert), event = next(iter(self._flying.items()))
            if not event.done():  # nor are those behind it on the link
                break
            event.wait(0.0)
            cache.landed(layer, expert)
            cache.unpin(layer, expert)
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
        for layer, expert in self.director.cache.in_flight():  # never handed to the device
            self.director.lost(layer, expert)
        for layer, expert in list(self._staged):
            self.unstage(layer, expert)
        self.director.abandon()
        self.check_integrity()

    def warm(self, timeout_s: float) -> None:
        """Fill free slots with whom the policy values most, and wait until they are there."""
        cache = self.director.cache
        for layer in range(len(self._layers)):
            for expert in cache.favourites(layer):
                self.admit(Admission(layer, expert, cache.admit(layer, expert)))
        self.settle(timeout_s)

    def check_integrity(self) -> None:
        """Raise if the book contradicts itself or the device, between two layers.

        Raises
        ------
        SlotError, CapacityError, AssertionError
            Saying how.
        """
        self.director.check_integrity()
        lost = set(self.director.cache.in_flight()) ^ self._flying.keys()
        if lost:
            raise SlotError(
                f"of the copies on their way the cache and the device know different ones, of "
                f"(layer, expert) {sorted(lost)[:4]}",
                hint="this is a defect of the executor: please report it",
            )
        if self._staged or len(self._free_staging) != STAGING:
            raise SlotError(
                f"{len(self._free_staging)} of {STAGING} staging slots are free, and staged are "
                f"(layer, expert) {sorted(self._staged)}",
                hint="this is a defect of the executor: please report it",
            )
