"""Experts on a device: what is copied where, what is staged, and what is found to be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_experts.errors import SlotError
from planner.decide.director import Admission
from planner.foretell.memory import STAGING
from shared_layers import exact, random_layers, shared_executor

SLOTS = 5


@pytest.fixture
def residents() -> Any:
    """What is on a device with room for ``SLOTS`` experts: nothing yet."""
    return shared_executor(random_layers(), SLOTS).residents


def test_staged_experts_lie_behind_the_residents(residents: Any) -> None:
    """Both are found by their ids; a slot that is given back is the last to be taken again."""
    residents.director.cache.admit(0, 3)
    residents.admit(Admission(0, 3, None))
    for expert in range(4, 4 + STAGING):
        residents.stage(0, expert)
    assert residents.slots(0, [3, 4, 5]) == [0, SLOTS, SLOTS + 1]
    with pytest.raises(SlotError, match=f"layer 0, expert 1: all {STAGING} are taken"):
        residents.stage(0, 1)
    residents.unstage(0, 5)
    assert residents.free_staging == 1
    residents.stage(1, 7)
    assert residents.slots(1, [7]) == [SLOTS + 1]


def test_a_copy_pins_its_expert_until_it_has_landed() -> None:
    """Nobody is evicted whose slot is still written to."""
    executor = shared_executor(random_layers(), SLOTS)
    residents, cache = executor.residents, executor.director.cache
    cache.admit(0, 3)
    residents.admit(Admission(0, 3, None))
    assert (cache.pinned(0, 3), cache.in_flight()) == (True, [(0, 3)])
    residents.settle(5.0)
    assert (cache.pinned(0, 3), cache.in_flight()) == (False, [])
    residents.check_integrity()


def test_what_was_never_copied_is_not_resident_after_a_break(residents: Any) -> None:
    """Slots that were given out without a copy, and staged experts, are free again."""
    cache = residents.director.cache
    for expert in (2, 5):
        cache.admit(0, expert)
    residents.admit(Admission(0, 2, None))
    residents.stage(1, 6)
    with pytest.raises(SlotError, match=r"\[\(0, 5\)\]"):
        residents.check_integrity()
    residents.recover(5.0)
    assert cache.residency(0) == {2}
    assert residents.free_staging == STAGING


def test_staging_slots_that_are_not_given_back_are_found(residents: Any) -> None:
    """Between two layers nothing is staged."""
    residents.stage(0, 1)
    with pytest.raises(SlotError, match=r"3 of 4 staging slots are free.*\[\(0, 1\)\]"):
        residents.check_integrity()


def test_experts_are_copied_into_the_slots_of_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device holds, slot by slot, the blocks of those that the cache says are there."""
    layers = random_layers()
    executor = shared_executor(layers, SLOTS)
    device, written = exact(executor), {}
    copy = device.copy

    def copied(block: Any, slot: int, what: str) -> Any:
        written[slot] = block
        return copy(block, slot, what)

    monkeypatch.setattr(device, "copy", copied)
    executor.guard.warm()
    for layer, blocks in enumerate(layers):
        for expert, slot in executor.director.cache.slots(layer).items():
            np.testing.assert_array_equal(written.pop(slot), blocks.blocks[expert])
    assert not written
