"""The slot table: ids in and out, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gpu_experts.errors import SlotError
from gpu_experts.slots import SlotState, SlotTable

LAYERS, EXPERTS = 2, 4

keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class SlotMachine(RuleBasedStateMachine):
    """Any calls in any order, against a plain dict from expert to what is known of it."""

    @initialize(kept=st.integers(0, 4), staging=st.integers(0, 2))
    def start(self, kept: int, staging: int) -> None:
        self.table = SlotTable(kept, staging)
        self.kept, self.staging = kept, staging
        self.held: dict[tuple[int, int], dict] = {}

    def _count(self, staged: bool) -> int:
        return sum(entry["staged"] == staged for entry in self.held.values())

    def _attempt(self, allowed: bool, method, key):
        """Call; it must raise exactly when the model says it is not allowed."""
        if allowed:
            return method(*key)
        with pytest.raises(SlotError):
            method(*key)
        return None

    @rule(key=keys, staged=st.booleans())
    def take(self, key, staged):
        """A free slot of its side, given to one expert."""
        room = self.staging if staged else self.kept
        allowed = key not in self.held and self._count(staged) < room
        method = self.table.stage if staged else self.table.assign
        slot = self._attempt(allowed, method, key)
        if allowed:
            assert (slot >= self.kept) == staged
            assert slot not in [entry["slot"] for entry in self.held.values()]
            self.held[key] = {"slot": slot, "staged": staged, "ready": False, "pins": 0}

    @rule(key=keys)
    def ready(self, key):
        allowed = key in self.held and not self.held[key]["ready"]
        self._attempt(allowed, self.table.ready, key)
        if allowed:
            self.held[key]["ready"] = True

    @rule(key=keys)
    def pin(self, key):
        self._attempt(key in self.held, self.table.pin, key)
        if key in self.held:
            self.held[key]["pins"] += 1

    @rule(key=keys)
    def unpin(self, key):
        allowed = key in self.held and self.held[key]["pins"] > 0
        self._attempt(allowed, self.table.unpin, key)
        if allowed:
            self.held[key]["pins"] -= 1

    @rule(key=keys)
    def release(self, key):
        """Only what is ready and has no pin."""
        entry = self.held.get(key)
        allowed = entry is not None and entry["ready"] and not entry["pins"]
        slot = self._attempt(allowed, self.table.release, key)
        if allowed:
            assert slot == self.held.pop(key)["slot"]

    @rule(key=keys)
    def lose(self, key):
        """Only what never arrived, pinned or not."""
        allowed = key in self.held and not self.held[key]["ready"]
        slot = self._attempt(allowed, self.table.lost, key)
        if allowed:
            assert slot == self.held.pop(key)["slot"]

    @rule()
    def unstage(self):
        """All staged experts that are over, at once."""
        over = {
            key
            for key, entry in self.held.items()
            if entry["staged"] and entry["ready"] and not entry["pins"]
        }
        assert set(self.table.unstage()) == over
        for key in over:
            del self.held[key]

    @invariant()
    def same(self) -> None:
        """The table says what the model knows, of every expert."""
        if not hasattr(self, "table"):
            return
        self.table.check_integrity()
        assert set(self.table) == set(self.held)
        assert len(self.table) == len(self.held)
        assert self.table.free == self.kept - self._count(False)
        assert self.table.free_staging == self.staging - self._count(True)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                entry = self.held.get((layer, expert))
                assert ((layer, expert) in self.table) == (entry is not None)
                state = self.table.state(layer, expert)
                if entry is None:
                    assert state is SlotState.FREE
                    with pytest.raises(SlotError, match=f"expert {expert} is in no slot"):
                        self.table.slots(layer, [expert])
                else:
                    assert self.table.slots(layer, [expert]) == [entry["slot"]]
                    assert (state is SlotState.READY) == entry["ready"]


TestSlotMachine = SlotMachine.TestCase


def test_slots_are_reused_in_the_order_in_which_they_became_free() -> None:
    """The slot that was free for longest comes first: the device is done with it."""
    table = SlotTable(3)
    for expert in range(3):
        assert table.assign(0, expert) == expert
        table.ready(0, expert)
    for expert in (1, 2, 0):
        table.release(0, expert)
    assert [table.assign(1, expert) for expert in range(3)] == [1, 2, 0]


def test_errors_name_the_expert_the_slot_and_the_reason() -> None:
    """Every refusal says which expert, where it is, and what stands against it."""
    table = SlotTable(1, 1)
    table.assign(4, 7)
    with pytest.raises(SlotError, match="no free slot for layer 5, expert 1: all 1 hold") as full:
        table.assign(5, 1)
    assert full.value.hint == "release one first"
    with pytest.raises(SlotError, match="layer 4, expert 7 in slot 0 is loading"):
        table.release(4, 7)
    table.pin(4, 7)
    table.ready(4, 7)
    with pytest.raises(SlotError, match="layer 4, expert 7 in slot 0 has 1 pins"):
        table.release(4, 7)
    with pytest.raises(SlotError, match="layer 4, expert 7 is in slot 0"):
        table.stage(4, 7)
    with pytest.raises(SlotError, match="layer 9, expert 9 is in no slot"):
        table.pin(9, 9)
    with pytest.raises(SlotError, match="is ready, not lost"):
        table.lost(4, 7)
    with pytest.raises(SlotError, match="cannot be"):
        SlotTable(-1)


def test_integrity_is_really_checked() -> None:
    """A slot that is lost, or held and free at once, is found."""
    lost = SlotTable(2)
    lost._free.popleft()
    with pytest.raises(AssertionError, match="twice or lost"):
        lost.check_integrity()
    twice = SlotTable(2)
    twice.assign(0, 0)
    twice._free.append(0)
    with pytest.raises(AssertionError, match="twice or lost"):
        twice.check_integrity()
