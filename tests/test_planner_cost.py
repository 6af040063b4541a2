"""The cost model against arithmetic done by hand, and calibration points against the formula."""

from __future__ import annotations

from typing import Any

import pytest

from planner.cost import CostModel, ExpertCost, interpolate, weight_bytes
from planner.errors import CostError, WorkError
from planner.hardware import Point
from planner.spec import Estimate, Source
from planner_examples import bare_machine, machine, machine_table, quantity, small_model

PARAMS = 3 * 1024 * 512
BYTES = PARAMS * 4.5 / 8


def point(lane: str, load: int, seconds: float) -> dict[str, Any]:
    shape = {"hidden": 1024, "intermediate": 512, "format": "q4_0"}
    return {"lane": lane, "load": load, "seconds": seconds, **shape}


def test_an_expert_costs_its_bytes_or_its_operations() -> None:
    """Memory sets the floor, compute the slope: checked by hand on round rates."""
    cost = ExpertCost(small_model(), machine(), "q4_0")
    assert cost.bytes == BYTES
    assert cost.cpu_s(1) == pytest.approx(BYTES / 10e9)
    assert cost.cpu_s(40) == pytest.approx(40 * 2 * PARAMS / 100e9)
    assert cost.gpu_s(1) == pytest.approx(BYTES / 100e9)
    assert cost.copy_s() == pytest.approx(BYTES / 1e9 + 1e-6)
    assert cost.cpu_set_s([1, 1, 40]) == pytest.approx(1e-5 + 2 * cost.cpu_s(1) + cost.cpu_s(40))
    assert cost.cpu_set_s([]) == 0.0


def test_estimates_carry_source_and_error() -> None:
    """A duration is as sure as the rate it came from; a sum as its weakest part."""
    cost = ExpertCost(small_model(), machine(), "q4_0")
    estimate = cost.cpu_estimate(1)
    assert estimate.source is Source.ANALYTIC
    assert estimate.error == pytest.approx(0.1 * estimate.value)
    total = Estimate(1.0, Source.MEASURED, 0.3) + Estimate(2.0, Source.ASSUMED, 0.4)
    assert total == Estimate(3.0, Source.ASSUMED, 0.5)
    assert (total + Estimate(1.0, Source.FITTED)).error is None
    assert 2 * Estimate(1.0, Source.FITTED, 0.1) == Estimate(2.0, Source.FITTED, 0.2)
    with pytest.raises(WorkError, match="-1"):
        Estimate(-1.0, Source.MEASURED)


def test_calibration_points_replace_the_formula() -> None:
    """Measured where a point lies, interpolated between, fitted beyond the last."""
    points = [point("cpu", 1, 1e-3), point("cpu", 8, 2e-3), point("cpu", 16, 4e-3)]
    cost = ExpertCost(small_model(), machine(points=points), "q4_0")
    assert cost.cpu_estimate(8) == Estimate(2e-3, Source.MEASURED)
    assert cost.cpu_s(12) == pytest.approx(3e-3)
    assert cost.cpu_estimate(12).source is Source.MEASURED
    beyond = cost.cpu_estimate(24)
    assert beyond.value == pytest.approx(6e-3)
    assert beyond.source is Source.FITTED
    # Points of another format say nothing about this one.
    other = ExpertCost(small_model(), machine(points=points), "q8_0")
    assert other.cpu_estimate(1).source is Source.ANALYTIC


def test_missing_data_raises() -> None:
    """No number is invented: below the first point, beyond a single one, without a GPU."""
    single = [Point(lane="cpu", hidden=1, intermediate=1, format="q4_0", load=4, seconds=1.0)]
    with pytest.raises(CostError, match="load 2"):
        interpolate(single, 2)
    with pytest.raises(CostError, match="load 8"):
        interpolate(single, 8)
    bare = ExpertCost(small_model(), bare_machine(), "q4_0")
    assert bare.cpu_s(1) > 0
    for ask in (lambda: bare.gpu_s(1), bare.copy_s):
        with pytest.raises(CostError, match="neither rates nor calibration points"):
            ask()
    with pytest.raises(CostError, match="unknown weight format 'q5_1'"):
        weight_bytes(1, "q5_1")


def test_dense_work_runs_where_its_weights_are() -> None:
    """On the GPU the host prepares meanwhile; on the CPU its time adds up."""
    model = small_model()
    layer = model.layers[0]
    cpu = {**machine_table()["cpu"], "layer_overhead_s": quantity(1.0)}
    assert CostModel(model, machine(cpu=cpu)).mixer(layer, 1, 1).value == 1.0
    bare = machine(cpu=cpu, gpu=None, link=None)
    assert CostModel(model, bare).mixer(layer, 1, 1).value > 1.0


def test_longer_context_and_more_tokens_cost_more() -> None:
    """The cache is read once per sequence; scores grow with what a token sees."""
    cost = CostModel(small_model(), machine())
    layer = cost.model.layers[0]
    assert cost.mixer(layer, 1, 4096).value > cost.mixer(layer, 1, 16).value
    two = cost.mixer(layer, 2, 4096, sequences=2).value
    assert two > cost.mixer(layer, 1, 4096).value
    assert cost.mixer(layer, 512, 512).value > cost.mixer(layer, 1, 512).value
    assert cost.head(4).value >= cost.head(1).value
    assert cost.disk_read(3).value == pytest.approx(3 * (BYTES / 1e8 + 1e-4))
