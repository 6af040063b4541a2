"""What other programs take of the processors, and which measurements are kept for it."""

from __future__ import annotations

import pytest

from hybrid.measure.interference import Others, Times, Turns, system_times


class System:
    """Counts seconds of two processors; nothing happens by itself."""

    def __init__(self) -> None:
        self.now = Times(0.0, 0.0, 0.0)

    def __call__(self) -> Times:
        return self.now

    def let_pass(self, seconds: float, own_s: float, others_s: float) -> None:
        busy_s, mine_s, all_s = self.now
        self.now = Times(busy_s + own_s + others_s, mine_s + own_s, all_s + 2 * seconds)


def test_laps_tell_what_others_took() -> None:
    """A share of all processors; what the system's clock cannot tell apart counts as nothing."""
    system = System()
    others = Others(system)
    system.let_pass(10.0, own_s=8.0, others_s=4.02)
    assert others.lap() == pytest.approx(0.2)
    assert others.lap() == 0.0, "no time has passed"
    system.let_pass(0.1, own_s=0.2, others_s=0.01)
    assert others.lap() == 0.0
    system.let_pass(1.0, own_s=2.5, others_s=0.0)
    assert others.lap() == 0.0


def test_the_system_counts_this_program() -> None:
    """All of it is busy time, and time goes on."""
    before = system_times()
    sum(range(2_000_000))
    after = system_times()
    assert after.all_s >= before.all_s > 0
    assert after.own_s >= before.own_s > 0
    assert after.busy_s <= after.all_s


def test_calm_measurements_count_and_else_the_calmest() -> None:
    """The first only where it is alone; what came between two measurements belongs to none."""
    system = System()
    turns: Turns[str] = Turns(Others(system))

    def measure(name: str, others_s: float) -> str:
        def run() -> str:
            system.let_pass(1.0, own_s=1.0, others_s=others_s + 0.02)
            return name

        return turns.measure(run)

    assert measure("first", 0.0) == "first"
    assert turns.kept() == ["first"]
    system.let_pass(1.0, own_s=0.0, others_s=2.0)
    for name, others_s in (("a", 0.4), ("b", 0.0), ("c", 1.0), ("d", 0.2)):
        measure(name, others_s)
    assert turns.kept() == ["b", "d", "a"]
    assert turns.disturbed() == pytest.approx((0.0 + 0.1 + 0.2) / 3)
    assert turns.wanting(2)
    assert not turns.wanting(1)
    for name in "efg":
        measure(name, 0.05)
    assert turns.kept() == ["b", "e", "f", "g"]
    assert turns.disturbed() < 0.05
    assert turns.first() == "first"


def test_a_machine_that_is_never_calm_is_given_up() -> None:
    """Three times as many as were wanted, and no more."""
    system = System()
    turns: Turns[None] = Turns(Others(system))
    while not turns or turns.wanting(4):
        turns.measure(lambda: system.let_pass(1.0, own_s=1.0, others_s=1.0))
    assert len(turns) == 13
    assert turns.disturbed() == pytest.approx(0.49)
