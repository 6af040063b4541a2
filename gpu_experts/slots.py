"""Which expert lies in which slot: ids only, no memory and no device.

One pool of slots serves all layers. A slot is free, loading (its copy was enqueued) or ready.
A few slots are for staging: experts that are copied, used once and not kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from gpu_experts.errors import SlotError


class SlotState(Enum):
    """What a slot is for now."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True)
class _Held:
    slot: int
    state: SlotState = SlotState.LOADING
    pins: int = 0


class SlotTable:
    """The map from (layer, expert) to slots ``0 .. kept + staging - 1``, staging slots last.

    Parameters
    ----------
    kept
        Slots for resident experts.
    staging
        Slots for experts that are used once.

    Notes
    -----
    Slots are given out in the order in which they became free, so that the one that a device
    is most likely done with comes first. An expert that is pinned or loading is in use or in
    flight: releasing it is an error. Every method is O(1) but :meth:`unstage`,
    :meth:`check_integrity` and iteration.
    """

    def __init__(self, kept: int, staging: int = 0) -> None:
        if kept < 0 or staging < 0:
            raise SlotError(f"a table of {kept} kept and {staging} staging slots cannot be")
        self.kept = kept
        self.staging = staging
        self._held: dict[tuple[int, int], _Held] = {}
        self._staged: dict[tuple[int, int], None] = {}
        self._free = deque(range(kept))
        self._free_staging = deque(range(kept, kept + staging))

    @property
    def free(self) -> int:
        """Slots for resident experts that hold nothing."""
        return len(self._free)

    @property
    def free_staging(self) -> int:
        """Staging slots that hold nothing."""
        return len(self._free_staging)

    def __len__(self) -> int:
        """Experts held, staged ones included."""
        return len(self._held)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(layer, expert) of all that is held, in the order of arrival."""
        return iter(self._held)

    def assign(self, layer: int, expert: int) -> int:
        """Give a resident expert a slot, which is loading from now on.

        Raises
        ------
        SlotError
            When no slot is free or the expert has one.
        """
        if not self._free:
            raise SlotError(
                f"no free slot for layer {layer}, expert {expert}: all {self.kept} hold experts",
                hint="release one first",
            )
        return self._take(layer, expert, self._free)

    def stage(self, layer: int, expert: int) -> int:
        """Give an expert that is used once a staging slot, which is loading from now on.

        Raises
        ------
        SlotError
            When no staging slot is free or the expert has a slot.
        """
        if not self._free_staging:
            raise SlotError(
                f"no free staging slot for layer {layer}, expert {expert}:"
                f" all {self.staging} are taken",
                hint="release the staged experts whose compute was enqueued",
            )
        slot = self._take(layer, expert, self._free_staging)
        self._staged[layer, expert] = None
        return slot

    def _take(self, layer: int, expert: int, free: deque[int]) -> int:
        if (layer, expert) in self._held:
            raise SlotError(
                f"layer {layer}, expert {expert} is in slot {self._held[layer, expert].slot}"
            )
        slot = free.popleft()
        self._held[layer, expert] = _Held(slot)
        return slot

    def _find(self, layer: int, expert: int) -> _Held:
        held = self._held.get((layer, expert))
        if held is None:
            raise SlotError(f"layer {layer}, expert {expert} is in no slot")
        return held

    def slots(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The slots of experts, loading or ready.

        Raises
        ------
        SlotError
            When one has none.
        """
        held = self._held
        try:
            return [held[layer, expert].slot for expert in experts]
        except KeyError as missing:
            raise SlotError(f"layer {layer}, expert {missing.args[0][1]} is in no slot") from None

    def state(self, layer: int, expert: int) -> SlotState:
        """Whether the expert is loading or ready; FREE when it has no slot."""
        held = self._held.get((layer, expert))
        return SlotState.FREE if held is None else held.state

    def ready(self, layer: int, expert: int) -> None:
        """Its copy arrived.

        Raises
        ------
        SlotError
            When the expert is in no slot or was ready before.
        """
        held = self._find(layer, expert)
        if held.state is SlotState.READY:
            raise SlotError(f"layer {layer}, expert {expert} is ready in slot {held.slot} already")
        held.state = SlotState.READY

    def pin(self, layer: int, expert: int) -> None:
        """Count one more use that forbids to release the expert.

        Raises
        ------
        SlotError
            When the expert is in no slot.
        """
        self._find(layer, expert).pins += 1

    def unpin(self, layer: int, expert: int) -> None:
        """Take one pin back.

        Raises
        ------
        SlotError
            When the expert is in no slot or has no pin.
        """
        held = self._find(layer, expert)
        if not held.pins:
            raise SlotError(f"layer {layer}, expert {expert} in slot {held.slot} is not pinned")
        held.pins -= 1

    def release(self, layer: int, expert: int) -> int:
        """Free a ready expert's slot, staged or not, and return it.

        Raises
        ------
        SlotError
            When the expert is in no slot, pinned, or loading.
        """
        held = self._find(layer, expert)
        if held.pins or held.state is SlotState.LOADING:
            why = f"has {held.pins} pins" if held.pins else "is loading"
            raise SlotError(f"layer {layer}, expert {expert} in slot {held.slot} {why}")
        return self._drop(layer, expert)

    def lost(self, layer: int, expert: int) -> int:
        """Free the slot of an expert whose copy failed or was given up, pins and all.

        Raises
        ------
        SlotError
            When the expert is in no slot or ready.
        """
        held = self._find(layer, expert)
        if held.state is SlotState.READY:
            raise SlotError(
                f"layer {layer}, expert {expert} in slot {held.slot} is ready, not lost"
            )
        return self._drop(layer, expert)

    def unstage(self) -> tuple[tuple[int, int], ...]:
        """Release every staged expert that is ready and not pinned; return which they were."""
        over = tuple(
            key
            for key in self._staged
            if not self._held[key].pins and self._held[key].state is SlotState.READY
        )
        for key in over:
            self._drop(*key)
        return over

    def _drop(self, layer: int, expert: int) -> int:
        slot = self._held.pop((layer, expert)).slot
        self._staged.pop((layer, expert), None)
        (self._free if slot < self.kept else self._free_staging).append(slot)
        return slot

    def check_integrity(self) -> None:
        """Assert that every slot is free or held, exactly once, and on its side."""
        held = [entry.slot for entry in self._held.values()]
        slots = sorted([*held, *self._free, *self._free_staging])
        assert slots == list(range(self.kept + self.staging)), f"slots twice or lost: {slots}"
        assert all(slot < self.kept for slot in self._free), self._free
        assert all(slot >= self.kept for slot in self._free_staging), self._free_staging
        for key, entry in self._held.items():
            assert (key in self._staged) == (entry.slot >= self.kept), (key, entry)
            assert entry.pins >= 0, (key, entry)
            assert entry.state is not SlotState.FREE, (key, entry)
        assert self._staged.keys() <= self._held.keys(), self._staged
