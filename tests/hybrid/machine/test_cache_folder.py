"""The cache folder: one that cannot be used is named, with the variable that moves it."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.paths import cache_dir, check_temporary_folder, make_cache_folder
from hybrid.weights.cache import converted_copy


@pytest.mark.parametrize("place", ["{file}", "{file}/below", "~nobody-of-this-name/cache"])
@pytest.mark.parametrize("command", [["run", "{model}", "-p", "x"], ["calibrate", "{model}"]])
def test_a_cache_folder_that_cannot_be(
    place: str,
    command: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file in the way or nobody's home: exit code 2, one line, one hint, nothing measured."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("HYBRID_CACHE", place.format(file=file))
    assert main([word.format(model=tiny_model) for word in command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert place.format(file=file) in error
    assert "HYBRID_CACHE" in hint
    assert "Traceback" not in err


def test_a_cache_folder_that_is_only_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was converted before is loaded from it; nothing else can be converted."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    copy, _ = converted_copy(tiny_model, "q4_0", None)
    monkeypatch.setattr("hybrid.paths.can_be_made", lambda file: False)
    assert converted_copy(tiny_model, "q4_0", None)[0] == copy
    with pytest.raises(UsageError, match="cannot write to the folder") as caught:
        converted_copy(tiny_model, "q8_0", None)
    assert str(tmp_path) in caught.value.message
    assert "HYBRID_CACHE" in str(caught.value.hint)
    with pytest.raises(UsageError, match=str(tmp_path)) as caught:
        converted_copy(tiny_model, "q8_0", None, tmp_path / "own")
    assert "cache_dir" in str(caught.value.hint)


def test_folders_of_the_cache_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that are above them."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "a" / "b"))
    assert make_cache_folder("c") == cache_dir() / "c"
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_no_temporary_folder_is_one_error(monkeypatch):
    """torch cannot be imported then: what to set is said before that."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(UsageError, match="no folder for temporary files") as caught:
        check_temporary_folder()
    assert "TMPDIR" in str(caught.value.hint)


COMMANDS = [
    ["run", "{model}", "-p", "x"],
    ["convert", "{model}", "{folder}/to"],
    ["plan", "{model}", "-H", "rtx4060-laptop", "--tokens", "2"],
    ["calibrate", "{model}"],
    ["bench", "kernels"],
    ["bench", "model", "{model}"],
    ["bench", "perplexity", "{model}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_temporary_folder_that_cannot_be(
    command: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What TMPDIR names in vain is said before anything is loaded: no other is taken quietly."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert main([word.format(model=tiny_model, folder=tmp_path) for word in command]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert (
        error == f"error: TMPDIR is '{tmp_path / 'none'}', which is no folder that can be written"
    )
    assert "TMPDIR" in hint
    assert list(tmp_path.iterdir()) == []


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["calibrate", "{model}"], "hybrid.measure.calibrate._replica"),
        (["bench", "model", "--spec", "olmoe"], "hybrid.measure.random_model.check_room"),
    ],
    ids=["calibrate", "bench"],
)
def test_a_full_disk_of_temporary_files(
    command: list[str],
    written: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the disk, and nothing is left on it."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("hybrid.bench.model._calibrate", lambda *_: None)
    monkeypatch.setattr(written, full)
    assert main([word.format(model=tiny_model) for word in command]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == f"error: the disk of {tmp_path} is full"
    assert "TMPDIR" in hint
    assert not list(tmp_path.glob("hybrid-*"))
    assert not list(tmp_path.glob("cache/*.toml"))


def test_a_full_disk_of_converted_copies(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, no copy that could be taken for a whole one, and the next run goes on."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    words = ["run", str(tiny_model), "-p", "x", "-n", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("hybrid.weights.dense_writer.sync", full)
        assert main(words) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: the disk of ")
    assert "is full" in error
    assert "goes on from there" in hint
    assert [path.suffix for path in (tmp_path / "converted").iterdir() if path.is_dir()] == [
        ".partial"
    ]
    assert main(words) == 0
    (copy,) = [path for path in (tmp_path / "converted").iterdir() if path.is_dir()]
    assert (copy / "experts.bin").is_file()
