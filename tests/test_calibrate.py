"""``hybrid calibrate``: what measurements become, on fake clocks; a tiny model for real."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from cpu_experts.experts import ExpertShape
from hybrid.calibration import calibrate as calibration
from hybrid.calibration import calibrated, measure
from hybrid.calibration.calibrate import covers, hardware_for
from hybrid.calibration.calibrated import Identity
from hybrid.calibration.calibrated_spec import Measured, ModelParts, to_spec
from hybrid.calibration.measure import (
    LOADS,
    Budget,
    DiskTimes,
    ExpertTimes,
    disk_times,
    expert_times,
)
from hybrid.calibration.measure_device import DeviceTimes, device_times
from hybrid.calibration.others import Others, Times
from hybrid.calibration.parts import Part
from hybrid.calibration.subject import subject
from hybrid.cli import main
from hybrid.errors import UsageError
from planner.errors import SpecError
from planner.hardware import HardwareSpec, to_toml
from planner.spec import Source

SHAPE = ExpertShape(hidden=64, intermediate=32, format="q4_0")
WEIGHTS = 3 * 64 * 32
BYTES = WEIGHTS * 4.5 / 8


class Clock:
    """Stands still until something takes time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


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


def calm() -> Times:
    """A system that counts nothing."""
    return Times(0.0, 0.0, 0.0)


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


def measured() -> Measured:
    """A machine of round numbers: 10 GB/s, experts at half of it."""
    times = ExpertTimes(
        SHAPE, [1e-5, 3e-5, 2e-5], {1: [2 * BYTES / 10e9] * 3, 512: [512 * 2 * WEIGHTS / 1e12] * 3}
    )
    parts = [
        Part("attention", "full", 1000, 2, 2, (4e-3,)),
        Part("attention", "full", 1000, 1, 9, (1e-3, 3e-3)),
        Part("feed_forward", "", 10, 1, 9, (0.0,)),
        Part("head", "", 500, 1, 9, (1e-3,)),
        Part("head", "", 500, 1, 90, (3e-3,)),
        Part("call", "", 500, 1, 9, (5e-3,)),
        Part("call", "", 500, 2, 2, (6e-3,)),
        Part("expert", "", WEIGHTS, 1, 1, (7e-6,)),
    ]
    return Measured(
        reads=[9e9, 10e9, 11e9],
        disk=DiskTimes([1e9], [1e-4], cached=False),
        experts=[times],
        parts=[ModelParts("qwen3_moe", "q4_0", "bf16", parts)],
    )


WHEN = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)


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
            if name != "name":
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


def test_the_disk_is_read_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are positive and nothing is left; a folder that is none names the variable."""
    monkeypatch.setattr(measure, "_DISK_BYTES", 1 << 23)
    found = disk_times(tmp_path, Budget(1))
    assert min(*found.bytes_per_s, *found.latency_s) > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        disk_times(tmp_path / "none", Budget(1))
    assert "HYBRID_CACHE" in str(caught.value.hint)


@dataclass
class Done:
    """An event; waiting for it takes until its end."""

    clock: Clock
    start_s: float
    end_s: float
    what: str = ""

    def done(self) -> bool:
        return self.clock.now_s >= self.end_s

    def wait(self, timeout_s: float) -> None:
        self.clock.now_s = max(self.clock.now_s, self.end_s)

    def span(self) -> tuple[float, float]:
        return self.start_s, self.end_s


@dataclass
class FakeDevice:
    """Copies at 1 kB/s with a latency of 2 s; a launch takes 3 s, an expert 5 s a token."""

    clock: Clock
    name: str = "fake"
    torch_device: Any = torch.device("cpu")  # noqa: RUF009
    opened: list[int] = field(default_factory=list)
    link_free_s: float = 0.0

    def memory(self) -> Any:
        return type("Memory", (), {"total_bytes": 1 << 30, "free_bytes": 1 << 29})

    def open(self, layout: Any, slots: int) -> None:
        self.opened.append(slots)

    def close(self) -> None:
        self.opened.append(0)

    def copy(self, block: Any, slot: int, what: str) -> Done:
        begin_s = max(self.clock.now_s, self.link_free_s)
        first = 2.0 if begin_s == self.clock.now_s else 0.0
        self.link_free_s = begin_s + first + SHAPE.block_bytes / 1e3
        return Done(self.clock, begin_s, self.link_free_s)

    def new_output(self, tokens: int) -> torch.Tensor:
        return torch.zeros(tokens, SHAPE.hidden)

    def compute(
        self, x: torch.Tensor, ids: Any, weights: Any, out: Any, after: Sequence[Any], what: str
    ) -> Done:
        seconds = 3.0 + 5.0 * ids.size
        return Done(self.clock, self.clock.now_s, self.clock.now_s + seconds)


class FakeLayer:
    """Experts that take a second a call."""

    shape = SHAPE

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.blocks = np.zeros((20, SHAPE.block_bytes), np.uint8)

    def __call__(self, *_: Any) -> None:
        self.clock.now_s += 1.0


def device_found() -> tuple[FakeDevice, DeviceTimes]:
    clock = Clock()
    device: Any = FakeDevice(clock)
    return device, device_times(device, [FakeLayer(clock)], 4, Budget(1e9, clock), clock)


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


def test_subjects_are_found_with_their_formats(tmp_path: Path, tiny_model: Path) -> None:
    """A name, a directory, a converted one; what cannot be is refused by name."""
    named = subject("qwen3-30b")
    assert (named.model.name, named.experts, named.dense) == ("Qwen3-30B-A3B", "q4_0", "bf16")
    assert subject(tiny_model, dense="q8_0").dense == "q8_0"
    settings = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    assert subject(tmp_path).dense == "f32"
    stored = {"quant_method": "hybrid", "experts": "q8_0", "dense": None}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": stored}))
    assert subject(tmp_path).experts == "q8_0"
    with pytest.raises(UsageError, match="converted with experts q8_0, not q4_0"):
        subject(tmp_path, experts="q4_0")
    with pytest.raises(UsageError, match="there is no file"):
        subject(tmp_path / "none.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    with pytest.raises(SpecError, match="not a Mixture-of-Experts"):
        subject(tmp_path)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Little memory, a short file, short prompts, a cache folder of its own, nobody else."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "_DISK_BYTES", 1 << 22)
    monkeypatch.setattr("hybrid.calibration.others.system_times", calm)
    monkeypatch.setattr(measure, "LOADS", (1, 2, 4))
    monkeypatch.setattr(calibration, "PROMPTS", (2, 8))
    monkeypatch.setattr(calibration, "DECODED_AFTER", (8,))
    monkeypatch.setattr(calibration, "DECODED", 12)
    monkeypatch.setattr(calibration, "TURNS", (2, 2))
    return tmp_path


def test_calibrate_from_the_command_line(
    quick: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured, kept, written and in force: plan and env use it; the second time nothing runs."""
    out = quick / "machine.toml"
    words = ["calibrate", str(tiny_model), "--threads", "1"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    identity = Identity.of_this_machine(1)
    assert found["path"] == str(identity.path)
    spec = calibrated.load(identity)
    assert spec is not None
    assert covers(spec, subject(tiny_model))
    assert not covers(spec, subject(tiny_model, dense="q4_0"))
    assert not covers(spec, subject("OLMoE"))
    assert {term.term for term in spec.terms} == {
        *("attention", "feed_forward", "head", "call", "sampling", "text", "expert")
    }
    assert {(t.tokens, t.context) for t in spec.terms if t.term == "attention"} >= {(2, 2), (8, 8)}
    assert sum(t.tokens == 1 for t in spec.terms if t.term == "attention") == 1
    assert [point.load for point in spec.points] == [1, 2, 4]
    assert out.read_text() == identity.path.read_text()
    assert sorted(path.name for path in quick.iterdir()) == ["hardware", "machine.toml"]
    before = identity.path.stat().st_mtime_ns
    assert main([*words, "--out", str(out)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "measured before" in printed.err
    assert re.search(r"^read bandwidth +\S+ GB/s", printed.out, re.MULTILINE)
    assert identity.path.stat().st_mtime_ns == before
    plan = ["plan", str(tiny_model), "-H", str(out), "--prompt", "8", "--context", "32"]
    assert main([*plan, "--json"]) == 0
    terms = json.loads(capsys.readouterr().out)["terms"]
    assert terms["around the layers"]["value_s"] > 0
    assert terms["attention and router"]["source"] in ("measured", "fitted")


def test_an_interruption_leaves_nothing(
    quick: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the middle: exit code 130, no file kept, no replica left, the old one in force."""
    folders = quick / "tmp"
    folders.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folders))

    def interrupt(*_: Any) -> None:
        assert list(folders.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_run", interrupt)
    assert main(["calibrate", str(tiny_model), "--threads", "1"]) == 130
    assert not list(folders.iterdir())
    assert not (quick / "hardware").exists()
    assert [path.name for path in quick.iterdir()] == ["tmp"]


def test_a_damaged_calibration_is_measured_again_by_force_only(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --force the user hears of it; other models' points survive a new measurement."""
    spec = to_spec(measured(), Identity.of_this_machine(2), WHEN)
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: spec)
    path = calibrated.save(spec, Identity.of_this_machine(2))
    path.write_text("[cpu")
    with pytest.raises(UsageError, match="cannot be used"):
        hardware_for(threads=2)
    assert hardware_for(threads=2, force=True) == spec
    assert hardware_for(threads=2) == spec
    other = replace(spec, terms=(replace(spec.terms[0], family="mixtral"),))
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: other)
    assert hardware_for("OLMoE", threads=2).terms == other.terms + spec.terms


def test_a_disturbed_calibration_is_measured_again(
    quick: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next one that comes along, without --force; of two disturbed ones the better stays."""
    calm_one = hardware_for(tiny_model, threads=1)
    made: list[float] = []

    def disturbed(share: float | None) -> HardwareSpec:
        terms = tuple(replace(term, disturbed=share) for term in calm_one.terms)
        return replace(calm_one, summary=f"{share}", terms=terms)

    def calibrate(*_: Any, **__: Any) -> HardwareSpec:
        made.append(left.pop(0))
        return disturbed(made[-1] or None)

    left = [0.3, 0.5, 0.1, 0.0]
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    calibrated.save(disturbed(0.4), Identity.of_this_machine(1))
    assert hardware_for(tiny_model, threads=1).summary == "0.3"
    assert hardware_for(tiny_model, threads=1).summary == "0.3", "the new one was worse"
    assert hardware_for(threads=1).summary == "0.1"
    assert hardware_for(tiny_model, threads=1).summary == "None"
    assert hardware_for(tiny_model, threads=1).summary == "None"
    assert made == [0.3, 0.5, 0.1, 0.0]
