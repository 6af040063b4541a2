"""The calibration in force: whose it is, how it is kept, and what a damaged one says."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity, added, load, require, save
from planner.describe.hardware import HardwareSpec, Point, TermPoint
from planner.describe.terms import HEAD, MIXER
from planner_examples import bare_machine, machine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder without a calibration."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    return tmp_path


def point(hidden: int, seconds: float, fmt: str = "q4_0") -> Point:
    shape = {"hidden": hidden, "intermediate": 4, "format": fmt}
    return Point(lane="cpu", load=1, seconds=seconds, **shape)


def term(params: int, seconds: float, family: str = "qwen3_moe") -> TermPoint:
    about: dict[str, Any] = {"format": "bf16", "tokens": 1, "context": 1}
    return TermPoint(term=HEAD, family=family, params=params, seconds=seconds, **about)


def test_identity_is_this_machine_and_these_kernels(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything that changes speed changes the file; asking twice does not."""
    here = Identity.of_this_machine(2)
    assert here == Identity.of_this_machine(2)
    assert here.path.parent == home / "hardware"
    others = [
        replace(here, **{name: value})
        for name, value in {
            "cpu": "another",
            "cores": here.cores + 1,
            "threads": 3,
            "simd_level": "none",
            "ram_bytes": 1,
            "device": "a GPU",
            "kernels": "changed",
            "versions": "torch 9",
        }.items()
    ]
    assert len({here.path, *(other.path for other in others)}) == 9
    monkeypatch.setenv("HYBRID_SIMD", "portable")
    assert Identity.of_this_machine(2).path != here.path


@pytest.mark.parametrize(
    ("source", "alone", "shared"),
    [
        ("cpu_experts/kernels/experts.py", True, True),
        ("hybrid/fast/decode.py", True, True),
        ("hybrid/packed/experts.py", True, True),
        ("hybrid/packed/bf16_products.py", True, True),
        ("hybrid/packed/dense.py", True, True),
        ("hybrid/measure/experts.py", True, True),
        ("gpu_experts/cuda/kernels.py", False, True),
        ("hybrid/sharing/executor.py", False, True),
        ("hybrid/sharing/predictor.py", False, True),
        ("planner/decide/director.py", False, True),
        ("hybrid/cli/env.py", False, False),
        ("hybrid/session/report.py", False, False),
    ],
)
def test_software_is_told_by_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, alone: bool, shared: bool
) -> None:
    """One changed letter of what is timed is another hash; of what runs beside a device, with a
    device only; of all else, never. Each of these files exists."""
    assert (Path(calibrations.__file__).parents[2] / source).is_file()
    file = tmp_path / source
    file.parent.mkdir(parents=True)
    file.write_text("a = 1")
    monkeypatch.setattr(calibrations, "__file__", str(tmp_path / "hybrid/machine/here.py"))
    digest = calibrations._kernels.__wrapped__
    before = digest(False), digest(True)
    file.write_text("a = 2")
    assert (digest(False) != before[0], digest(True) != before[1]) == (alone, shared)


def test_libraries_are_told_by_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed, without importing them; one that is missing is left out."""
    found = calibrations._versions()
    for name in ("torch", "numba", "transformers"):
        assert f"{name} {metadata.version(name)}" in found
    known = {"torch": "3.0", "numba": "1.0"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(calibrations.metadata, "version", version)
    assert calibrations._versions.__wrapped__() == "torch 3.0, numba 1.0"


def test_an_update_is_told_from_a_new_machine(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 'pip install -U' the old calibration is no longer in force, and the user hears why."""
    here = Identity.of_this_machine()
    assert "not calibrated yet" in calibrations.missing()
    save(bare_machine(), replace(here, cpu="another", versions="torch 1"))
    assert "not calibrated yet" in calibrations.missing()
    save(bare_machine(), replace(here, versions="torch 1", kernels="old"))
    assert "before hybrid or its libraries were updated" in calibrations.missing()
    with pytest.raises(UsageError, match="were updated") as caught:
        require()
    assert "hybrid calibrate" in str(caught.value.hint)
    assert main(["env"]) == 0
    assert "none: this machine was calibrated before hybrid" in capsys.readouterr().out


def test_a_stale_calibration_is_known_whatever_the_locale(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor's name may hold letters that the locale's encoding has not."""
    monkeypatch.setattr("hybrid.machine.host.cpu_name", lambda: "Prozessor® für Büros")
    save(bare_machine(), replace(Identity.of_this_machine(), kernels="old"))
    real = Path.read_text

    def read_text(path: Path, encoding: str = "ascii", errors: str | None = None) -> str:
        return real(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert "before hybrid or its libraries were updated" in calibrations.missing()


def test_what_is_saved_is_in_force(home: Path) -> None:
    """Only for the machine it was measured on, and with its identity to read."""
    here = Identity.of_this_machine()
    assert load() is None
    with pytest.raises(UsageError) as caught:
        require()
    assert "hybrid calibrate" in str(caught.value.hint)
    path = save(bare_machine(), here)
    assert require() == bare_machine()
    assert f"# simd_level: {here.simd_level}" in path.read_text()
    assert load(replace(here, threads=here.threads + 1)) is None


@pytest.mark.parametrize("content", [b"name = 'cut", b"name = 'x'", b"\xff\xfe", b"[cpu]\n"])
def test_a_damaged_file_names_itself_and_the_remedy(
    home: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan ends with exit code 2 and the command that helps; env tells it and goes on."""
    path = save(bare_machine(), Identity.of_this_machine())
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load()
    assert str(path) in caught.value.message
    assert "hybrid calibrate --force" in str(caught.value.hint)
    assert main(["plan", "OLMoE"]) == 2
    assert "hybrid calibrate --force" in capsys.readouterr().err
    assert main(["env"]) == 0
    assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_the_old_file(
    home: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written, nothing left beside it."""
    here = Identity.of_this_machine()
    path = save(bare_machine(), here)

    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(UsageError if error is OSError else error):
        save(machine(), here)
    assert list(path.parent.iterdir()) == [path]
    assert load() == bare_machine()


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way is named, with the variable that moves the folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError) as caught:
        save(bare_machine(), Identity.of_this_machine())
    assert "HYBRID_CACHE" in str(caught.value.hint)


def test_another_model_is_added() -> None:
    """New points replace those of the same shape, whatever their loads; others stay."""
    old = replace(
        bare_machine(),
        points=(point(1, 1.0), replace(point(1, 9.0), load=9), point(1, 2.0, "q8_0")),
        terms=(term(5, 1.0), term(5, 1.0, "mixtral"), term(6, 1.0)),
    )
    new = replace(machine(), points=(point(1, 3.0),), terms=(term(5, 3.0),))
    both = added(old, new)
    assert both.points == (point(1, 3.0), point(1, 2.0, "q8_0"))
    assert both.terms == (term(5, 3.0), term(5, 1.0, "mixtral"), term(6, 1.0))
    assert (both.cpu, both.gpu) == (new.cpu, new.gpu)
    assert added(None, new) == new


def test_what_was_disturbed_is_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worst of it, with the remedy; env shows it, a calm calibration says nothing."""
    calm = replace(bare_machine(), points=(point(1, 1.0),), terms=(term(1, 1.0),))
    assert "disturbed" not in dict(calibrations.main_numbers(calm))
    points = (replace(point(1, 1.0), disturbed=0.1),)
    save(
        replace(calm, points=points, terms=(replace(term(1, 1.0), disturbed=0.25),)),
        Identity.of_this_machine(),
    )
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "other programs used 25% of the processors; measure this machine with" in shown


def test_plan_uses_it_and_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --hardware the calibration counts; --hardware still wins; env shows it."""
    words = ["plan", "OLMoE", "--tokens", "2", "--prompt", "8", "--context", "32"]
    assert main(words) == 2
    assert "hybrid calibrate" in capsys.readouterr().err
    spec = HardwareSpec(
        name="this-machine",
        summary="as measured",
        cpu=bare_machine().cpu,
        disk=bare_machine().disk,
        points=(point(1, 1.0),),
        terms=(replace(term(1, 1.0), term=MIXER),),
    )
    save(spec, Identity.of_this_machine())
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "this-machine: as measured" in out
    assert "as it was calibrated" in err
    assert main([*words, "-H", "cpu-only-laptop"]) == 0
    out, err = capsys.readouterr()
    assert "this-machine" not in out + err
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for part in ("as measured", "10.0 GB/s ± 10%", "1 x 4 q4_0", "qwen3_moe with bf16"):
        assert part in shown
