"""``hybrid calibrate``: a tiny model for real; what is kept, and what is measured again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_machine import WHEN, measured
from hybrid.ask.asked_model import find_model
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.measure import calibrate as calibration
from hybrid.measure.calibrate import covers, hardware_for
from hybrid.measure.describe import to_spec
from planner.describe.hardware import PANELS, HardwareSpec
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER, SAMPLING, TEXT
from planner.errors import SpecError


def test_subjects_are_found_with_their_formats(tmp_path: Path, tiny_model: Path) -> None:
    """A name, a directory, a converted one; what cannot be is refused by name."""
    named = find_model("qwen3-30b")
    assert (named.spec.name, named.experts, named.dense) == ("Qwen3-30B-A3B", "q4_0", "bf16")
    assert find_model(tiny_model, dense="q8_0").dense == "q8_0"
    settings = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    assert find_model(tmp_path).dense == "f32"
    stored = {"quant_method": "hybrid", "experts": "q8_0", "dense": None}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": stored}))
    assert find_model(tmp_path).experts == "q8_0"
    with pytest.raises(UsageError, match="converted with experts q8_0, not q4_0"):
        find_model(tmp_path, experts="q4_0")
    with pytest.raises(UsageError, match="there is no file"):
        find_model(tmp_path / "none.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    with pytest.raises(SpecError, match="lacks hidden_size"):
        find_model(tmp_path)


def test_calibrate_from_the_command_line(
    quick: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], either_processor: bool
) -> None:
    """Measured, kept, written and in force: plan and env use it; the second time nothing runs.

    Panels are measured, too, where there are units for bfloat16.
    """
    out = quick / "machine.toml"
    words = ["calibrate", str(tiny_model), "--threads", "1"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    identity = Identity.of_this_machine(1)
    assert found["path"] == str(identity.path)
    spec = calibrations.load(identity)
    assert spec is not None
    assert covers(spec, find_model(tiny_model))
    assert not covers(spec, find_model(tiny_model, dense="q4_0"))
    assert not covers(spec, find_model("OLMoE"))
    assert {term.term for term in spec.terms} == {*(MIXER, DENSE, HEAD, CALL, SAMPLING, TEXT, CPU)}
    assert {(t.tokens, t.context) for t in spec.terms if t.term == MIXER} >= {(2, 2), (8, 8)}
    assert sum(t.tokens == 1 for t in spec.terms if t.term == MIXER) == 1
    loads = [(point.lane, point.load) for point in spec.points]
    panels = [(PANELS, 2), (PANELS, 4)] if either_processor else []
    assert loads == [("cpu", 1), ("cpu", 2), ("cpu", 4), *panels]
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
    path = calibrations.save(spec, Identity.of_this_machine(2))
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
    calibrations.save(disturbed(0.4), Identity.of_this_machine(1))
    assert hardware_for(tiny_model, threads=1).summary == "0.3"
    assert hardware_for(tiny_model, threads=1).summary == "0.3", "the new one was worse"
    assert hardware_for(threads=1).summary == "0.1"
    assert hardware_for(tiny_model, threads=1).summary == "None"
    assert hardware_for(tiny_model, threads=1).summary == "None"
    assert made == [0.3, 0.5, 0.1, 0.0]
