"""What measurements become: every number of a machine with its spread and where it is from."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from fake_machine import WHEN, device_found, measured
from hybrid.calibration import calibrated
from hybrid.calibration.calibrated import Identity
from hybrid.calibration.calibrated_spec import to_spec
from hybrid.calibration.measure import DiskTimes
from planner.hardware import HardwareSpec, to_toml
from planner.spec import Source


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
    assert terms["attention", 1, 9].seconds == 2e-3
    assert terms["attention", 1, 9].error == pytest.approx(1e-3)
    assert terms["head", 1, 1].seconds == 2e-3  # contexts are merged
    assert terms["feed_forward", 1, 1].error is None
    assert (terms["expert", 1, 1].format, terms["call", 2, 2].format) == ("q4_0", "bf16")


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
    told = dict(calibrated.main_numbers(spec))["disturbed"]
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
