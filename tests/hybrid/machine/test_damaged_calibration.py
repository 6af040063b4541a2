"""A damaged calibration costs a run its predictions and nothing else, and is told once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_experts.cuda import CUDA
from hybrid.cli import main
from hybrid.demo import demo_path
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.session import known
from planner_examples import bare_machine

EMULATED = "emulated, exact"
RUN = ["run", "-p", "import os", "-n", "3", "--greedy", "-t", "1"]


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose calibrations of one thread, with a device and without, end in the middle.

    One thread is not what this machine would take by itself.
    """
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(host, "default_threads", lambda: 2)
    for device in ("", EMULATED):
        path = calibrations.save(bare_machine(), Identity.of_this_machine(1, device))
        path.write_text(path.read_text()[:200])
    return tmp_path


def test_a_run_goes_on(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text, exit code 0, and one note with the command that helps; the same in the report."""
    assert main(RUN) == 0
    out, err = capsys.readouterr()
    assert out
    assert err.count("a damaged calibration") == 1
    assert err.count("hybrid calibrate --force --threads 1'") == 1
    assert main([*RUN, "--report"]) == 0
    report = capsys.readouterr().err
    command = "'hybrid calibrate demo --threads 1 --force'"
    assert f"none: the calibration of this machine is damaged; {command}" in report
    assert "a damaged calibration" in report


def test_a_run_with_a_device_goes_on(cut: Path, capfd: Any) -> None:
    """It is placed as on a machine that was never measured, and every file is written."""
    files = {name: cut / name for name in ("uses.json", "routing.npz", "lanes.json")}
    words = [*RUN, "--vram", "1GiB", "--popularity", str(files["uses.json"])]
    words += ["--routing", str(files["routing.npz"]), "--perfetto", str(files["lanes.json"])]
    assert main(words) == 0
    err = capfd.readouterr().err
    for command in ("'hybrid calibrate --force --threads 1'", "--device emulated --threads 1'"):
        assert command in err
    assert json.loads(files["uses.json"].read_text())["tokens"] > 0
    assert all(file.stat().st_size for file in files.values())


def test_one_file_that_cannot_be_written_costs_no_other(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeline's folder goes away meanwhile: exit code 2, and the counts are there."""
    uses, lanes = tmp_path / "uses.json", tmp_path / "gone" / "lanes.json"
    lanes.parent.mkdir()
    monkeypatch.setattr("hybrid.cli.generation.set_seed", lambda seed: lanes.parent.rmdir())
    words = [*RUN, "--vram", "1GiB", "--popularity", str(uses), "--perfetto", str(lanes)]
    assert main(words) == 2
    assert f"cannot write {lanes}" in capfd.readouterr().err
    assert json.loads(uses.read_text())["tokens"] > 0


def test_a_device_is_measured_anew(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a device is measured when it is first used, a damaged measurement is replaced."""
    asked: list[dict[str, Any]] = []

    def hardware_for(directory: Path, **options: Any) -> Any:
        asked.append(options)
        return bare_machine()

    monkeypatch.setattr(known, "hardware_for", hardware_for)
    for name in (EMULATED, "another"):
        device: Any = SimpleNamespace(name=name, backend=CUDA)
        assert known.machine_with(device, demo_path(), 1).spec == bare_machine()
    assert [options["force"] for options in asked] == [True, False]
    assert capsys.readouterr().err.count("measuring anew") == 1


def test_a_calibration_that_lacks_what_is_needed(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that can be read but predicts nothing is told in the report, not raised."""
    from planner.errors import CostError

    def fail(*_: Any, **__: Any) -> None:
        raise CostError("there is no rate", hint="measure it")

    monkeypatch.setattr("hybrid.ledger.prediction.predicted", fail)
    assert main([*RUN, "--report"]) == 0
    assert "none: there is no rate" in capsys.readouterr().err
