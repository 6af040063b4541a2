"""Files that the command line is to write: refused before anything takes long, in its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.cli import generation, main


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU on which nothing may be loaded."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("it was loaded before it was checked")

    monkeypatch.setattr(generation, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("option", "file", "said"),
    [
        ("--perfetto", "", "--perfetto '.' is a folder"),
        ("--perfetto", "{there}", "exists already"),
        ("--perfetto", "{none}/lanes.json", "cannot write to {none}"),
        ("--perfetto", "{there}/lanes.json", "cannot write to {there}"),
        ("--perfetto", "x" * 300, "cannot be used: File name too long"),
        ("--routing", "{folder}/r.txt", "ends in .npz"),
        ("--routing", "{none}/r.npz", "cannot write to {none}"),
        ("--popularity", "{none}/uses.json", "cannot write to {none}"),
        ("--popularity", "{folder}", "is a folder"),
        ("--popularity", "{folder}/none.npz", "there is no such routing trace"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_files_that_cannot_be_written(
    option: str, file: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names option and file, one hint, nothing loaded."""
    there = tmp_path / "there.json"
    there.write_text("")
    names = {"none": tmp_path / "none", "folder": tmp_path, "there": there}
    words = ["run", "-p", "x", "--vram", "1GiB", option, file.format(**names)]
    assert main(words) == 2
    out, err = capsys.readouterr()
    error, hint = err.splitlines()
    assert out == ""
    assert option in error
    assert said.format(**names) in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    "words",
    [["calibrate", "--out"], ["plan", "demo", "--html"], ["plan", "demo", "--perfetto"]],
    ids=" ".join,
)
def test_nothing_is_measured_or_planned_for_a_file_that_cannot_be(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder that is missing, a folder itself, a file that exists: named before any work."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("it was worked on before the file was checked")

    monkeypatch.setattr("hybrid.measure.calibrate.hardware_for", fail)
    monkeypatch.setattr("hybrid.cli.plan.machine_for", fail)
    there = tmp_path / "there.toml"
    there.write_text("mine")
    for file, said, hint in (
        (tmp_path / "none" / "x", f"cannot write to {tmp_path / 'none'}", "folder that exists"),
        (tmp_path, "is a folder", "a file's name"),
        (there, f"{there} exists", "--force"),
    ):
        assert main([*words, str(file)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert words[-1] in err.splitlines()[0]
        assert said in err.splitlines()[0]
        assert hint in err.splitlines()[1]
    assert there.read_text() == "mine"


@pytest.mark.parametrize("device", [[], ["--vram", "0GiB"], ["--device", "cpu"]])
@pytest.mark.parametrize("option", ["--perfetto", "--routing", "--popularity"])
@pytest.mark.usefixtures("unloaded")
def test_files_that_the_cpu_alone_does_not_fill(
    option: str, device: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in the command line's words, before anything is loaded."""
    file = tmp_path / ("r.npz" if option == "--routing" else "file.json")
    assert main(["run", "-p", "x", *device, option, str(file)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert f"{option}: on the CPU alone" in error
    assert "vram=" not in error + hint
    assert f"leave {option} out" in hint


def test_help_tells_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    """What --vram and --ram take, and what they are when they are left out."""
    assert main(["run", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "auto is what is free, 0 is the CPU alone. [default: (auto)]" in said
    assert "auto is all of it" in said
