"""The verdict of ``hybrid env``: what is said to be slower than it could be, and the exit code."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from cpu_experts.jit import hostcpu
from hybrid.cli import main, verdict
from hybrid.cli.verdict import Finding
from hybrid.machine import calibrations, host, versions
from hybrid.machine.calibrations import Identity
from planner_examples import bare_machine

AVX2 = frozenset({"avx2", "fma", "f16c"})
UNITS = frozenset({"avx512bf16", "amx-bf16"})
SIMD = hostcpu.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A processor with AVX2 and two cores, tested versions, no GPU, nothing calibrated or set."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    for name in (SIMD, "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hostcpu, "host_features", lambda: AVX2)
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    monkeypatch.setattr(host, "most_threads", lambda: 2)
    monkeypatch.setattr(host, "gpus", list)
    monkeypatch.setattr(versions, "untested", tuple)


def found(what: str) -> Finding:
    """The finding about something, as it is by now."""
    (finding,) = [each for each in verdict.verdict() if each.what == what]
    return finding


def test_nothing_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine as it should be: said part by part and in one line, and --check agrees."""
    assert main(["env", "--check"]) == 0
    text = capsys.readouterr().out
    section = text[text.index("\nverdict ") + 1 :].splitlines()
    assert section[0].split(maxsplit=1)[1] == "nothing is slower than it could be on this machine"
    parts = ["fast path", "SIMD level", "bfloat16 units", "threads", "calibration", "versions"]
    assert [line[2:17].strip() for line in section[1:]] == parts
    assert f"torch {metadata.version('torch')}" in section[-1]


def test_the_exit_code_is_0_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is slower is told in any case; only --check makes it a failure, as text and as JSON."""
    monkeypatch.setenv(SIMD, "portable")
    assert main(["env"]) == 0
    last = capsys.readouterr().out.partition("\nverdict")[2].splitlines()[0].strip()
    assert last == "slower than it could be, or not known to be as fast: SIMD level"
    assert main(["env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["verdict"]
    (slow,) = [finding for finding in told if finding["slower"]]
    assert slow == {
        "what": "SIMD level",
        "told": f"portable: {SIMD} asks for it, this processor runs avx2",
        "slower": True,
        "remedy": f"unset {SIMD}",
    }
    assert main(["env", "--check"]) == main(["env", "--check", "--json"]) == 1


@pytest.mark.parametrize(
    ("features", "asked", "told", "slower"),
    [
        (AVX2, "", "avx2, the best that this processor runs", False),
        (AVX2, "avxvnni-emulated", "avxvnni-emulated, emulated with AVX2", True),
        (frozenset(), "", "portable: there are no vector kernels", True),
    ],
)
def test_simd_levels(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], asked: str, told: str, slower: bool
) -> None:
    """The best that a processor runs is as fast as it gets, unless that is none of ours."""
    monkeypatch.setattr(hostcpu, "host_features", lambda: features)
    monkeypatch.setenv(SIMD, asked)
    finding = found("SIMD level")
    assert finding.told.startswith(told)
    assert (finding.slower, bool(finding.remedy)) == (slower, slower)


@pytest.mark.parametrize(
    ("features", "asked", "told", "slower"),
    [
        (AVX2, "", "this processor has none; dense layers are computed in float32", False),
        (AVX2, "avx2+bf16", f"{SIMD} counts on bf16, this processor has none", True),
        (AVX2 | UNITS, "", "used: amx, bf16; large models compute dense layers in bfloat16", False),
        (AVX2 | UNITS, "avx2", f"not used: {SIMD} hides those of this processor (amx, bf16)", True),
    ],
)
def test_bfloat16_units(
    monkeypatch: pytest.MonkeyPatch, features: frozenset[str], asked: str, told: str, slower: bool
) -> None:
    """Used where they are there, unless the environment hides them."""
    monkeypatch.setattr(hostcpu, "host_features", lambda: features)
    monkeypatch.setenv(SIMD, asked)
    finding = found("bfloat16 units")
    assert (finding.told, finding.slower) == (told, slower)


def test_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """None costs predictions, and speed where it tells what bfloat16 units are good for."""
    assert not found("calibration").slower
    assert "not calibrated yet: nothing is predicted; measure" in str(found("calibration"))
    monkeypatch.setattr(hostcpu, "host_features", lambda: AVX2 | UNITS)
    assert found("calibration").slower
    assert "use the bfloat16 units by a first rough measurement; measure" in str(
        found("calibration")
    )
    calibrations.save(bare_machine(), Identity.of_this_machine())
    assert found("calibration") == Finding(
        "calibration", "there is one, for predictions and for experts in prompts"
    )
    Identity.of_this_machine().path.write_text("damaged")
    assert found("calibration").slower
    assert "hybrid calibrate --force" in found("calibration").remedy


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one that was not tested, the fast path is an open question, and the remedy is told."""
    assert found("fast path").told.startswith("yes, for models whose layers pass")
    newer = versions.Untested("transformers", "6.0", ">=5.23,<5.25")
    monkeypatch.setattr(versions, "untested", lambda: (newer,))
    path = found("fast path")
    assert path.told == "not known before a model is loaded, with transformers 6.0"
    assert path.slower
    assert str(found("versions")) == f"{newer}; {newer.remedy}"
    assert found("versions").slower


def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command still runs, and says what is missing."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "numba":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert found("fast path").told == "no: numba cannot be loaded"
    assert str(found("versions")) == "not installed: numba; pip install numba"
    assert main(["env"]) == 0
    assert "numba              not installed" in capsys.readouterr().out


def test_a_gpu_has_a_path_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-token kernels are for models on the CPU alone."""
    monkeypatch.setattr(host, "gpus", lambda: [host.Gpu("H200", 1 << 37, "570")])
    assert found("fast path").told.startswith("yes on the CPU alone, for models")


def test_fewer_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment asks all programs for may be too little for this one."""
    assert not found("threads").slower
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finding = found("threads")
    assert finding.told == "1, for 2 cores: the environment asks for no more"
    assert finding.slower
