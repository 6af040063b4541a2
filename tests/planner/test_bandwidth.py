"""No rate is above what bounds it: which descriptions are refused, and what raises a bandwidth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.describe.bandwidth import exceeds, raised
from planner.describe.hardware import Point
from planner.errors import SpecError
from planner_examples import machine

BYTES = 3 * 2048 * 768 * 4.5 / 8
RATES = {"cpu": 10e9, "gpu": 100e9, "copy": 1e9}
NAMES = {
    "cpu": "cpu memory_bytes_per_s",
    "gpu": "gpu memory_bytes_per_s",
    "copy": "link bytes_per_s",
}


def _point(lane: str, rate: float, **changes: Any) -> dict[str, Any]:
    values = {"lane": lane, "hidden": 2048, "intermediate": 768, "format": "q4_0", "matrices": 3}
    return values | {"load": int(lane != "copy"), "seconds": BYTES / rate} | changes


def test_noise_exceeds_nothing() -> None:
    """Two percent between neighbours are not a fault, three are."""
    assert not exceeds(10.2e9, 10e9)
    assert exceeds(10.3e9, 10e9)


@pytest.mark.parametrize("lane", RATES)
def test_a_machine_that_contradicts_itself_is_refused(lane: str) -> None:
    """An expert read at 3.05 times the rate of its memory or link: both values and a remedy."""
    rate = 3.05 * RATES[lane]
    with pytest.raises(SpecError) as caught:
        machine(points=[_point(lane, rate)])
    told = f"round.toml: {NAMES[lane]} is {RATES[lane]:.4g}, but an expert of 2048 x 768 in q4_0"
    assert caught.value.message.startswith(told)
    assert f"is read at {rate:.4g}" in caught.value.message
    assert f"to {rate:.4g} or more" in str(caught.value.hint)


@pytest.mark.parametrize("lane", RATES)
@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": BYTES / 1.01},  # noise
        {"load": 2},  # more than reading takes time
        {"format": "unheard of"},
        {"seconds": 0.0},  # a difference of two times
        {"hidden": 256},  # may come from a cache
        {"matrices": 2, "seconds": 0.7 * BYTES},
    ],
    ids=["noise", "load", "format", "zero", "small", "two matrices"],
)
def test_what_is_no_contradiction_is_taken(lane: str, changes: dict[str, Any]) -> None:
    """Nothing that can be explained otherwise is refused, nor does it raise anything."""
    seconds = changes.get("seconds", 1 / 3)
    scaled = changes | {"seconds": seconds / RATES[lane]}
    if lane == "copy" and "load" in changes:
        scaled |= {"load": 2}
    found = machine(points=[_point(lane, 1.0, **scaled)])
    assert raised(found) is found


def test_points_without_matrices_have_two() -> None:
    """Nobody says whether there is a gate: what two matrices are read at is what counts."""
    point = _point("cpu", 14e9)
    del point["matrices"]
    assert machine(points=[point]).points[0].matrices == 2
    with pytest.raises(SpecError, match=r"is read at 1\.067e\+10"):
        machine(points=[point | {"seconds": BYTES / 16e9}])


def test_an_override_below_what_was_measured_is_refused() -> None:
    """Memory cannot be slower than it was, faster it can be."""
    found = machine(points=[_point("cpu", 9e9)])
    assert found.with_values("cpu", memory_bytes_per_s=20e9).cpu.memory_bytes_per_s.value == 20e9
    with pytest.raises(SpecError, match=r"round changed: .* is 5e\+09"):
        found.with_values("cpu", memory_bytes_per_s=5e9)


def test_raising_takes_the_fastest_and_keeps_what_is_reached() -> None:
    """All three bounds, each to its fastest point; what kernels reach in all stays the same."""
    factors = (0.5, 4.0, 5.0, 3.0)
    points = [Point(**_point(lane, f * rate)) for lane, rate in RATES.items() for f in factors]
    found = raised(replace(machine(), points=tuple(points)))
    assert found.gpu is not None
    assert found.link is not None
    assert found.cpu.memory_bytes_per_s.value == pytest.approx(50e9)
    assert found.gpu.memory_bytes_per_s.value == pytest.approx(500e9)
    assert found.link.bytes_per_s.value == pytest.approx(5e9)
    assert found.cpu.memory_efficiency.value == pytest.approx(0.2)
    assert found.gpu.memory_efficiency.value == pytest.approx(0.2)
    assert "an expert of 2048 x 768 in q4_0" in found.cpu.memory_bytes_per_s.origin
