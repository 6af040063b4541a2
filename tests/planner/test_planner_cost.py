"""The cost model against arithmetic done by hand, and calibration points against the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybrid.formats.errors import FormatError
from hybrid.formats.registry import weight_bytes
from planner.cost.cost import CostModel, ExpertCost, interpolate
from planner.cost.term_points import MeasuredTerms
from planner.describe.estimate import Estimate, Source
from planner.describe.hardware import Point, TermPoint
from planner.describe.terms import (
    CALL,
    CPU,
    DECIDING,
    DENSE,
    HANDING,
    HEAD,
    JOINING,
    MIXER,
    SAMPLING,
    TEXT,
)
from planner.errors import CostError, WorkError
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


def test_a_single_point_says_nothing_of_larger_loads() -> None:
    """A calibration that had time for one load only leaves the others to the machine's rates."""
    points = [point("cpu", 1, 1e-3), point("gpu", 1, 2e-3)]
    cost = ExpertCost(small_model(), machine(points=points), "q4_0")
    plain = ExpertCost(small_model(), machine(), "q4_0")
    assert (cost.cpu_s(1), cost.gpu_s(1)) == (1e-3, 2e-3)
    assert (cost.cpu_s(40), cost.gpu_s(40)) == (plain.cpu_s(40), plain.gpu_s(40))


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
    with pytest.raises(FormatError, match="unknown weight format 'q5_9'"):
        weight_bytes(1, "q5_9")


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


def term(name: str, tokens: int, context: int, seconds: float, **more: Any) -> TermPoint:
    """A point of a part of 100 weights."""
    about = {"family": "qwen3_moe", "params": 100, "format": "bf16", "error": 0.1 * seconds}
    where = {"tokens": tokens, "context": context, "seconds": seconds}
    return TermPoint(term=name, **{**about, **where, **more})


def test_measured_parts_are_looked_up_by_context_and_by_tokens() -> None:
    """Single tokens vary with the context, prompts with their tokens; the ends are marked."""
    points = [
        term(MIXER, 1, 100, 1.0),
        term(MIXER, 1, 300, 2.0),
        term(MIXER, 10, 10, 20.0),
        term(MIXER, 20, 20, 60.0),
    ]
    found = MeasuredTerms(points, "qwen3_moe")

    def decode(context: int) -> Estimate | None:
        return found.decode(MIXER, "", 100, "bf16", context)

    def prompt(tokens: int) -> Estimate | None:
        return found.prompt(MIXER, "", 100, "bf16", tokens)

    assert decode(100) == Estimate(1.0, Source.MEASURED, 0.1)
    assert decode(200) == Estimate(1.5, Source.MEASURED, 0.2)
    assert decode(5) == Estimate(1.0, Source.FITTED, 0.1)
    assert decode(500) == Estimate(3.0, Source.FITTED, 0.2)
    assert prompt(15) == Estimate(40.0, Source.MEASURED, 6.0)
    # 2 and 3 seconds a token at 10 and 20 tokens are 5 at 40: attention's square is kept.
    assert prompt(40) == Estimate(200.0, Source.FITTED, pytest.approx(20.0))
    assert prompt(2) == Estimate(20.0, Source.FITTED, 2.0)
    for other in ((HEAD, "", 100, "bf16"), (MIXER, "full", 100, "bf16")):
        assert found.decode(*other, 1) is None
        assert found.prompt(*other, 1) is None
    assert MeasuredTerms(points, "mixtral").decode(MIXER, "", 100, "bf16", 1) is None


def test_a_head_of_another_size_takes_its_part() -> None:
    """The nearest head in size is scaled, and is fitted then; attention never is."""
    points = [
        term(HEAD, 1, 1, 1.0),
        term(HEAD, 1, 1, 8.0, params=1000),
        term(CALL, 1, 1, 0.5),
        term(MIXER, 1, 1, 1.0),
    ]
    found = MeasuredTerms(points, "qwen3_moe")
    assert found.decode(HEAD, "", 900, "bf16", 1) == Estimate(
        7.2, Source.FITTED, pytest.approx(0.72)
    )
    assert found.decode(HEAD, "", 50, "bf16", 1) == Estimate(0.5, Source.FITTED, 0.05)
    assert found.decode(CALL, "", 900, "bf16", 1) == Estimate(0.5, Source.MEASURED, 0.05)
    assert found.decode(MIXER, "", 900, "bf16", 1) is None


def test_measured_parts_replace_the_roofline_on_the_cpu() -> None:
    """Attention, dense layers, head and call are what was measured; a GPU's machine ignores it."""
    model = small_model()
    layer = model.layers[0]
    points = (
        term(MIXER, 1, 64, 1.0, kind="full", params=layer.mixer.params),
        term(MIXER, 32, 32, 2.0, kind="full", params=layer.mixer.params),
        term(DENSE, 1, 1, 3.0, params=layer.ffn_params),
        term(DENSE, 32, 32, 4.0, params=layer.ffn_params),
        term(HEAD, 1, 1, 5.0, params=model.head_params),
        term(CALL, 1, 1, 6.0, params=model.head_params),
        term(CALL, 32, 32, 7.0, params=model.head_params),
        term(CPU, 1, 1, 8.0, params=model.experts.params_each, format="q4_0"),
    )
    cost = CostModel(model, replace(bare_machine(), terms=points))
    single = (cost.mixer(layer, 1, 64), cost.ffn(layer, 1), cost.head(1), cost.call(1))
    assert [estimate.value for estimate in single] == [1.0, 3.0, 5.0, 6.0]
    prompt = (cost.mixer(layer, 32, 32), cost.ffn(layer, 32), cost.call(32))
    assert [estimate.value for estimate in prompt] == [2.0, 4.0, 7.0]
    # One token's experts are a part of one call, more tokens' have a call of their own.
    assert cost.experts.cpu_set_s([1] * 4) == 4 * 8.0
    assert cost.experts.cpu_set_s([1] * 5) == pytest.approx(1e-5 + 5 * cost.experts.cpu_s(1))
    # What was not measured is still the roofline's: several sequences, another format.
    plain = CostModel(model, bare_machine())
    assert cost.mixer(layer, 2, 64, sequences=2) == plain.mixer(layer, 2, 64, sequences=2)
    q8 = CostModel(model, replace(bare_machine(), terms=points), dense_format="q8_0")
    assert q8.ffn(layer, 1) == CostModel(model, bare_machine(), dense_format="q8_0").ffn(layer, 1)
    with_gpu = CostModel(model, replace(machine(), terms=points))
    assert with_gpu.mixer(layer, 1, 64) == CostModel(model, machine()).mixer(layer, 1, 64)
    assert with_gpu.experts.cpu_set_s([1]) == CostModel(model, machine()).experts.cpu_set_s([1])


def test_dense_parts_on_a_gpu_are_measured_there() -> None:
    """Points of one lane never count for the other; text alone is written in the same place."""
    model = small_model()
    layer, head = model.layers[0], model.head_params
    params = model.experts.params_each
    points = tuple(
        term(name, tokens, tokens, seconds * factor, lane=lane, **more)
        for lane, factor in (("cpu", 1.0), ("gpu", 10.0))
        for tokens, seconds in ((1, 1.0), (32, 2.0))
        for name, more in (
            (MIXER, {"kind": "full", "params": layer.mixer.params}),
            (DENSE, {"params": layer.ffn_params}),
            (HEAD, {"params": head}),
            (CALL, {"params": head}),
            (DECIDING, {"params": params, "format": "q4_0"}),
            (HANDING, {"params": params, "format": "q4_0"}),
            (JOINING, {"params": params, "format": "q4_0"}),
            (SAMPLING, {"params": head}),
        )
    )
    points += (term(TEXT, 1, 1, 7.0, params=head),)
    for hardware, factor in ((bare_machine(), 1.0), (machine(), 10.0)):
        cost = CostModel(model, replace(hardware, terms=points))
        assert cost.knows()
        for tokens, seconds in ((1, factor), (32, 2 * factor)):
            assert cost.mixer(layer, tokens, tokens).value == seconds
            assert cost.ffn(layer, tokens).value == seconds
            assert cost.head(1, tokens).value == seconds
            assert cost.call(tokens).value == seconds
            assert cost.deciding(tokens).value == (seconds if hardware.gpu else 0.0)
            assert cost.deciding(tokens, 3).value == (4 * seconds if hardware.gpu else 0.0)
            assert cost.joining(tokens).value == (seconds if hardware.gpu else 0.0)
        assert (cost.extra(SAMPLING).value, cost.extra(TEXT).value) == (factor, 7.0)
        # A prompt is computed at once there.
        assert cost.pieces(2048) == [(2048, 2048)]
    others = tuple(point for point in points if point.lane == "cpu")
    unknown = CostModel(model, replace(machine(), terms=others))
    assert not unknown.knows()
    assert unknown.deciding(1) == Estimate(0.0, Source.ASSUMED)
    assert unknown.mixer(layer, 1, 64) == CostModel(model, machine()).mixer(layer, 1, 64)


def test_a_machine_states_what_surrounds_the_layers() -> None:
    """Without a measured family the machine's own figures count; without those nothing does."""
    model = small_model()
    assert CostModel(model, bare_machine()).call(1) == Estimate(0.0, Source.ASSUMED)
    cpu = machine_table()["cpu"]
    own = {"token_start_s": 1.0, "prompt_start_s": 2.0, "prompt_layer_overhead_s": 3.0}
    cpu |= {name: quantity(value) for name, value in own.items()}
    cost = CostModel(model, machine(cpu=cpu, gpu=None, link=None))
    assert (cost.call(1).value, cost.call(2).value) == (1.0, 2.0)
    layer = model.layers[0]
    assert cost.mixer(layer, 2, 2).value > 3.0 > cost.mixer(layer, 1, 2).value
    assert cost.mixer(layer, 2, 2, sequences=2).value < 3.0


def test_deciding_beside_a_gpu_is_the_machines_where_the_model_was_not_measured() -> None:
    """By activated experts, however many are copied; the CPU alone has nothing to decide."""
    model = small_model()
    experts = model.experts
    cpu = machine_table()["cpu"] | {"deciding_s": quantity(4.0)}
    cost = CostModel(model, machine(cpu=cpu))
    one = pytest.approx(4.0 * experts.top_k)
    assert [cost.deciding(1).value, cost.deciding(1, 3).value] == [one, one]
    assert 4.0 < cost.deciding(2).value / experts.top_k < 2 * 4.0
    assert cost.deciding(1000).value == pytest.approx(4.0 * experts.count)
    about = {"params": model.experts.params_each, "format": "q4_0", "lane": "gpu"}
    points = tuple(term(name, 1, 1, 0.5, **about) for name in (DECIDING, HANDING))
    measured = CostModel(model, replace(machine(cpu=cpu), terms=points))
    assert measured.deciding(1, 3).value == 2.0
    alone = CostModel(model, machine(cpu=cpu, gpu=None, link=None))
    assert alone.deciding(1) == Estimate(0.0, Source.ASSUMED)
