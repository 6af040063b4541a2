"""Measuring a machine, on a fake clock: what is told apart, repeated, and left out."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from fake_machine import SHAPE, Clock, calm, device_found
from hybrid.errors import UsageError
from hybrid.measure import experts as measure
from hybrid.measure.experts import LOADS, Budget, ExpertTimes, disk_times, expert_times
from hybrid.measure.interference import Others, Times


def test_repeating_ends_with_the_budget() -> None:
    """As often as wanted, then as time allows, and the least number anyway; the first is left."""
    clock = Clock()

    def measure_one() -> float:
        clock.now_s += 1.0
        return 1.0

    assert len(Budget(100, clock).repeat(measure_one, 1, 5)) == 5
    assert len(Budget(4.5, clock).repeat(measure_one, 1, 50)) == 3
    assert len(Budget(0, clock).repeat(measure_one, 3, 50)) == 2
    assert len(Budget(0, clock).repeat(measure_one, 1, 50)) == 1
    assert Budget(10, clock).part(0.3).left_s() == pytest.approx(3.0)


class FakeExperts:
    """A machine with a known start of a call and known costs of experts.

    While ``slow`` is above 1, other programs take half of the processors' time, and everything
    takes as many times as long.
    """

    start_s = 0.5

    def __init__(self) -> None:
        self.clock, self.slow = Clock(), 1.0
        self.busy_s = self.own_s = 0.0
        self.widths: set[int] = set()

    def cost(self, load: int) -> float:
        return 0.01 + 0.002 * load

    def __call__(self, x: Any, ids: Any, weights: Any) -> None:
        assert ids.shape == weights.shape
        assert len(ids) == len(x)
        self.widths.add(ids.shape[1])
        loads = np.bincount(np.asarray(ids).reshape(-1))
        loads = loads[loads > 0]
        assert len(set(loads.tolist())) == 1
        took_s = self.slow * (self.start_s + sum(map(self.cost, loads.tolist())))
        self.clock.now_s += took_s
        self.own_s += took_s
        self.busy_s += took_s * (1 if self.slow == 1.0 else 2)

    def times(self) -> Times:
        return Times(self.busy_s, self.own_s, 2 * self.clock.now_s)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (128, 8), (8, 8), (5, 1)])
def test_start_and_experts_are_told_apart(experts: int, top_k: int) -> None:
    """A machine with a known start and known costs is found again exactly, at every load."""
    run = FakeExperts()
    budget = Budget(1e9, run.clock)
    found = expert_times(
        [run, run], SHAPE, experts, top_k, budget, single=[run], others=Others(calm)
    )
    assert run.widths == {top_k, *(count for count in (1, 2, 4, 8) if count <= experts)}
    assert tuple(found.loads) == LOADS
    assert found.start_s == pytest.approx([0.5] * 6)
    assert found.disturbed == 0.0
    for load, samples in found.loads.items():
        assert samples == pytest.approx([run.cost(load)] * 6)
    short = expert_times([run], SHAPE, experts, top_k, Budget(0, run.clock), single=[run])
    assert tuple(short.loads) == (1,)


def test_a_single_expert_has_no_start_of_its_own() -> None:
    """Nothing tells a call from its only expert."""
    run = FakeExperts()
    found = expert_times([run], SHAPE, 1, 1, Budget(0, run.clock), single=[run])
    assert found.start_s == [0.0]
    assert found.loads[1] == pytest.approx([0.5 + run.cost(1)])


def test_the_start_survives_noise() -> None:
    """Every call off by up to a tenth leaves the start right to a tenth, however many experts
    there are: a large difference of long calls would be off by more than all of it."""
    run = FakeExperts()
    run.start_s = run.cost(1)
    rng = np.random.default_rng(1)

    def noisy(x: Any, ids: Any, weights: Any) -> None:
        run.slow = 1.0 + rng.uniform(-0.1, 0.1)
        run(x, ids, weights)

    budget = Budget(1e9, run.clock)
    found = expert_times([noisy], SHAPE, 128, 8, budget, single=[noisy], others=Others(calm))
    assert median(found.start_s) == pytest.approx(run.start_s, rel=0.1)
    assert median(found.loads[1]) == pytest.approx(run.cost(1), rel=0.05)


def test_disturbed_turns_are_taken_again() -> None:
    """While others take half the machine nothing counts, as long as there is time for calm turns;
    without any, the calibration says how disturbed it was."""
    run = FakeExperts()
    calls = 0

    def disturbed_at_first(x: Any, ids: Any, weights: Any) -> None:
        nonlocal calls
        calls += 1
        run.slow = 3.0 if calls < 300 else 1.0
        run(x, ids, weights)

    others = Others(run.times)
    budget = Budget(1e9, run.clock)
    runs: list[Any] = [disturbed_at_first]
    found = expert_times(runs, SHAPE, 16, 4, budget, single=runs, others=others)
    assert (found.disturbed, len(found.start_s)) == (0.0, 6)
    assert median(found.loads[8]) == pytest.approx(run.cost(8))

    def always_disturbed(x: Any, ids: Any, weights: Any) -> None:
        run.slow = 3.0
        run(x, ids, weights)

    found = expert_times([always_disturbed], SHAPE, 16, 4, budget, single=runs, others=others)
    assert found.disturbed > 0.2
    assert len(found.start_s) == 3, "the least disturbed ones, and it ended"


def test_two_measurements_are_joined() -> None:
    """Samples of both, also of loads that one had no time for; as disturbed as both on average."""
    early = ExpertTimes(SHAPE, [1.0], {1: [1.0], 2: [2.0]}, {2: [3.0]}, 0.2)
    late = ExpertTimes(SHAPE, [2.0], {1: [3.0], 4: [5.0]}, {}, 0.0)
    assert early.joined(late) == ExpertTimes(
        SHAPE, [1.0, 2.0], {1: [1.0, 3.0], 2: [2.0], 4: [5.0]}, {2: [3.0]}, 0.1
    )


def test_the_disk_is_read_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are positive and nothing is left; a folder that is none names the variable."""
    monkeypatch.setattr(measure, "_DISK_BYTES", 1 << 23)
    found = disk_times(tmp_path, Budget(1))
    assert min(*found.bytes_per_s, *found.latency_s) > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        disk_times(tmp_path / "none", Budget(1))
    assert "HYBRID_CACHE" in str(caught.value.hint)


def test_a_device_is_taken_apart() -> None:
    """Launch, experts at every load, copies and their latency come from the device's own spans."""
    device, found = device_found()
    assert device.opened == [16, 0]
    assert found.launch_s == pytest.approx([3.0] * len(found.launch_s))
    assert tuple(found.loads) == LOADS
    for load, samples in found.loads.items():
        assert samples == pytest.approx([5.0 * load] * len(samples))
    each_s = (12 * SHAPE.block_bytes / 1e3 + 2.0) / 12
    assert found.copies == pytest.approx([each_s] * 5)
    link, gpu = found.link("x"), found.gpu("x")
    assert link.bytes_per_s.value == pytest.approx(SHAPE.block_bytes / each_s)
    assert link.cpu_slowdown.value == 1.0
    assert gpu.launch_s.value == pytest.approx(3.0)
    assert gpu.vram_bytes.value == 1 << 30
    assert {point.lane for point in found.points()} == {"gpu", "copy"}
