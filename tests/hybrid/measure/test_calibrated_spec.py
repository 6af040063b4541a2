"""What measurements become: every number of a machine with its spread and where it is from."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from fake_machine import WHEN, device_found, measured
from hybrid.formats.block import Block
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.measure.describe import to_spec
from hybrid.measure.experts import DiskTimes, ExpertTimes
from planner.describe.estimate import Source
from planner.describe.hardware import HardwareSpec, to_toml
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER


def test_every_number_has_its_spread_and_origin() -> None:
    """Medians, deviations relative to them, and a text that says what was measured how often."""
    identity = Identity.of_this_machine(2)
    spec = to_spec(measured(), identity, WHEN)
    assert "calibrated 2030-01-02 03:04 UTC" in spec.summary
    assert "left out" not in spec.summary
    assert "other programs" not in spec.summary
    cpu = spec.cpu
    assert cpu.memory_bytes_per_s.value == 10e9
    assert cpu.memory_bytes_per_s.error == pytest.approx(0.0816, rel=1e-2)
    assert cpu.memory_efficiency.value == pytest.approx(0.5, rel=1e-3)
    assert cpu.flop_per_s.value == pytest.approx(1e12)
    assert cpu.start_s.value == 2e-5
    # What reading 1000 weights in bfloat16 at 10 GB/s does not explain.
    assert cpu.layer_overhead_s.value == pytest.approx(2e-3 - 2000 / 10e9)
    assert cpu.prompt_layer_overhead_s is not None
    assert cpu.prompt_layer_overhead_s.value == pytest.approx(4e-3 - 2000 / 10e9)
    assert cpu.token_start_s is not None
    assert cpu.token_start_s.value == 5e-3
    assert cpu.prompt_start_s is not None
    assert cpu.prompt_start_s.value == 6e-3
    for part in (cpu, spec.disk):
        for name, value in vars(part).items():
            if name.endswith("deciding_s"):
                assert value is None  # only a device needs it
            elif name != "name":
                assert value.origin.startswith("hybrid calibrate: ")
                assert value.source in (Source.MEASURED, Source.FITTED)
    assert "had been told to forget" in spec.disk.bytes_per_s.origin
    assert [(p.load, p.error) for p in spec.points] == [(1, 0.0), (512, 0.0)]
    terms = {(t.term, t.tokens, t.context): t for t in spec.terms}
    assert terms[MIXER, 1, 9].seconds == 2e-3
    assert terms[MIXER, 1, 9].error == pytest.approx(1e-3)
    assert terms[HEAD, 1, 1].seconds == 2e-3  # contexts are merged
    assert terms[DENSE, 1, 1].error is None
    assert (terms[CPU, 1, 1].format, terms[CALL, 2, 2].format) == ("q4_0", "bf16")


def _experts(rate: float, hidden: int = 2048, **changes: bool) -> ExpertTimes:
    """Experts of one token that are read at ``rate``."""
    shape = Block(hidden=hidden, intermediate=768, format="q4_0", **changes)
    size = (3 if shape.gated else 2) * hidden * 768 * 4.5 / 8
    return ExpertTimes(shape, [0.0], {1: [size / rate] * 3, 512: [1.0]})


@pytest.mark.parametrize("gated", [True, False])
def test_experts_that_read_faster_raise_the_bandwidth(gated: bool) -> None:
    """Reads of 10 GB/s beside experts at 40: memory does 40, the first experts 32 of them."""
    found = measured()
    found.experts = [_experts(32e9, gated=gated), _experts(40e9, 4096, gated=gated)]
    cpu = (spec := to_spec(found, Identity.of_this_machine(2), WHEN)).cpu
    assert cpu.memory_bytes_per_s.value == pytest.approx(40e9)
    assert "experts of 4096 x 768 in q4_0" in cpu.memory_bytes_per_s.origin
    assert cpu.memory_efficiency.value == pytest.approx(0.8)
    assert cpu.layer_overhead_s.value == pytest.approx(2e-3 - 2000 / 40e9)
    assert HardwareSpec.from_table(tomllib.loads(to_toml(spec)), "x") == spec


def test_experts_without_a_time_raise_nothing() -> None:
    """What a token adds is a difference of times; where it is lost in noise it says nothing."""
    found = measured()
    found.experts = [_experts(5e9)]
    found.experts[0].loads[1] = [0.0, 0.0, 1e-3]
    cpu = to_spec(found, Identity.of_this_machine(2), WHEN).cpu
    assert cpu.memory_bytes_per_s.value == 10e9


def test_experts_from_a_cache_say_nothing_about_memory() -> None:
    """Experts of a few KB at 40 GB/s: memory still does 10, and they all that can be told of it."""
    found = measured()
    found.experts = [_experts(40e9, 64)]
    cpu = (spec := to_spec(found, Identity.of_this_machine(2), WHEN)).cpu
    assert cpu.memory_bytes_per_s.value == 10e9
    assert cpu.memory_efficiency.value == 1.0
    assert HardwareSpec.from_table(tomllib.loads(to_toml(spec)), "x") == spec


def test_what_another_day_read_faster_raises_the_bandwidth() -> None:
    """A calibration keeps an older one's experts; what is reached of memory stays the same rate."""
    identity, before, now = Identity.of_this_machine(2), measured(), measured()
    before.experts, now.experts = [_experts(20e9)], [_experts(8e9, 4096)]
    both = calibrations.added(to_spec(before, identity, WHEN), to_spec(now, identity, WHEN))
    assert both.cpu.memory_bytes_per_s.value == pytest.approx(20e9)
    assert "1e+10 by hybrid calibrate" in both.cpu.memory_bytes_per_s.origin
    assert both.cpu.memory_efficiency.value == pytest.approx(0.4)
    assert HardwareSpec.from_table(tomllib.loads(to_toml(both)), "x") == both


def test_what_went_wrong_is_remarked() -> None:
    """Points without time, other programs, and a disk that memory may have answered for."""
    found = measured()
    found.left_out = ["prompts of 2048"]
    found.parts = [replace(found.parts[0], disturbed=0.3)]
    found.disk = DiskTimes([1e9], [1e-4], cached=True)
    spec = to_spec(found, Identity.of_this_machine(2), WHEN)
    assert "left out for lack of time: prompts of 2048" in spec.summary
    assert "other programs used 30% of the processors" in spec.summary
    assert "memory may have answered" in spec.disk.latency_s.origin
    assert {term.disturbed for term in spec.terms} == {0.3}
    assert {point.disturbed for point in spec.points} == {None}
    assert HardwareSpec.from_table(tomllib.loads(to_toml(spec)), "x") == spec
    told = dict(calibrations.main_numbers(spec))["disturbed"]
    assert "other programs used 30%" in told
    assert "'hybrid calibrate'" in told


def test_a_device_becomes_part_of_the_machine() -> None:
    """With a device there are a GPU, a link and their points, and the identity names it."""
    found = measured()
    found.device = device_found()[1]
    identity = Identity.of_this_machine(2, "fake")
    spec = to_spec(found, identity, WHEN)
    assert spec.gpu is not None
    assert spec.link is not None
    assert {point.lane for point in spec.points} == {"cpu", "gpu", "copy"}
    # The one-token kernels do not run beside a device: its layers cost what prompts' do.
    assert spec.cpu.layer_overhead_s == spec.cpu.prompt_layer_overhead_s
