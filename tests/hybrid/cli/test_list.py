"""``hybrid list`` and ``hybrid remove``: what is in the cache, and taking it out again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from gguf_files import recipe, write_gguf
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.weights.cache import converted_copy
from hybrid.weights.copies import beside, kept_copies

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of our own and of the hub."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny"))


def _listed(capsys: Captured) -> dict[str, list[dict[str, object]]]:
    capsys.readouterr()
    assert main(["list", "--json"]) == 0
    found: dict[str, list[dict[str, object]]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.usefixtures("cache")
def test_an_empty_cache(capsys: Captured) -> None:
    """Says how something gets there."""
    assert main(["list"]) == 0
    assert "no models" in capsys.readouterr().out
    assert _listed(capsys) == {"copies": [], "downloads": []}


@pytest.mark.usefixtures("cache")
def test_copies_are_listed_as_they_are_used(model: Path, capsys: Captured) -> None:
    """Sizes to the byte, formats, where from; who was used last comes first."""
    first, _ = converted_copy(model, "q8_0", None)
    second, _ = converted_copy(model, "q4_0", "q8_0")
    os.utime(beside(first, ".json"), (1e9, 1e9))
    os.utime(beside(second, ".json"), (2e9, 2e9))
    assert [copy["name"] for copy in _listed(capsys)["copies"]] == [second.name, first.name]
    assert converted_copy(model, "q8_0", None)[0] == first
    os.utime(beside(second, ".json"), (1e9, 1e9))
    found = _listed(capsys)["copies"]
    assert [copy["name"] for copy in found] == [first.name, second.name]
    assert found[0]["nbytes"] == sum(file.stat().st_size for file in first.iterdir())
    assert (found[1]["experts"], found[1]["dense"]) == ("q4_0", "q8_0")
    assert found[0]["source"] == str(model)
    assert found[0]["kept_as"] == {"experts": ["q8_0"], "dense": []}
    assert found[1]["kept_as"] == {"experts": ["q4_0"], "dense": ["q8_0"]}
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["copy", "size", "experts", "dense", "last", "used", "made", "of"]
    assert lines[1].startswith(first.name)
    assert str(model) in lines[1]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("by", ["name", "model", "path"])
def test_a_copy_is_removed(model: Path, by: str, capsys: Captured) -> None:
    """By its own name, or all of a model; nothing of it is left, and it can be made again."""
    copy, _ = converted_copy(model, "q8_0", None)
    other, _ = converted_copy(model, "q4_0", None)
    name = {"name": copy.name, "model": "tiny", "path": str(model)}[by]
    assert main(["remove", name]) == 0
    assert f"removed {copy.name}" in capsys.readouterr().err
    assert not list(copy.parent.glob(f"{copy.name}*"))
    assert other.is_dir() == (by == "name")
    assert converted_copy(model, "q8_0", None)[0].is_dir()


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_made_again_stays(model: Path, capsys: Captured) -> None:
    """Unless it is asked for."""
    copy, _ = converted_copy(model, "q8_0", None)
    shutil.rmtree(model)
    assert main(["list"]) == 0
    assert "no longer there" in capsys.readouterr().out
    assert main(["remove", copy.name]) == 2
    assert "cannot be made again" in capsys.readouterr().err
    assert copy.is_dir()
    assert main(["remove", copy.name, "--yes"]) == 0
    assert kept_copies() == []


@pytest.mark.usefixtures("cache")
def test_unfinished_and_busy_copies(model: Path, capsys: Captured) -> None:
    """Half a copy is listed as such and removed; one that is being written is not."""
    copy, _ = converted_copy(model, "q8_0", None)
    copy.rename(beside(copy, ".partial"))
    assert main(["list"]) == 0
    assert f"{copy.name} (not finished)" in capsys.readouterr().out
    with FileLock(str(beside(copy, ".wait"))):
        assert main(["remove", copy.name]) == 2
    assert "is being converted by another program" in capsys.readouterr().err
    assert main(["remove", copy.name]) == 0
    assert not list(copy.parent.glob(f"{copy.name}*"))


@pytest.mark.usefixtures("cache")
def test_formats_that_a_model_had_are_named(tmp_path: Path, capsys: Captured) -> None:
    """Where none was asked for, those that the copy has, most of them first."""
    file = write_gguf(tmp_path / "tiny.gguf", recipe("qwen3moe"), matrices="Q5_1")
    copy, _ = converted_copy(file, None, None)
    assert main(["list"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith(copy.name)
    assert row.split()[3:5] == ["q5_1", "q5_1"]


def test_a_limit_takes_what_can_be_made_again(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """The copies that were not used for longest go, but for those whose model is gone."""
    gone = shutil.copytree(model, tmp_path / "gone")
    kept = [converted_copy(gone, "q4_0", None)[0]]
    kept += [converted_copy(model, fmt, None)[0] for fmt in ("q8_0", "q4_0")]
    for used_s, copy in enumerate(kept):
        os.utime(beside(copy, ".json"), (1e9 + used_s, 1e9 + used_s))
    shutil.rmtree(gone)
    monkeypatch.setenv("HYBRID_CACHE_LIMIT", str(sum(copy.nbytes for copy in kept_copies()) + 1000))
    capsys.readouterr()
    new, _ = converted_copy(model, "q5_1", None)
    assert [copy.is_dir() for copy in (*kept, new)] == [True, False, True, True]
    assert f"removed {kept[1].name}" in capsys.readouterr().err
    monkeypatch.setenv("HYBRID_CACHE_LIMIT", "1KiB")
    new, _ = converted_copy(model, "q4_1", None)
    assert {copy.path for copy in kept_copies()} == {kept[0], new}
    assert "no other copy can be made again" in capsys.readouterr().err
    monkeypatch.setenv("HYBRID_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="HYBRID_CACHE_LIMIT 'much' is not a size"):
        converted_copy(model, "q5_0", None)


@pytest.mark.usefixtures("cache")
def test_unknown_names(model: Path, capsys: Captured) -> None:
    """The hint lists what there is; nothing is removed for the names before."""
    copy, _ = converted_copy(model, "q8_0", None)
    assert main(["remove", copy.name, "nobody"]) == 2
    said = capsys.readouterr().err
    assert "'nobody' is no copy in the cache" in said
    assert copy.name in said
    assert copy.is_dir()


def test_downloads(cache: Path, tiny_model: Path, tmp_path: Path, capsys: Captured) -> None:
    """Those of the hub are listed; the copies made of one go by its name, it by --download."""
    repo = tmp_path / "hub" / "models--who--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    copy, _ = converted_copy(snapshot, "q8_0", None)
    found = _listed(capsys)
    assert [each["repo"] for each in found["downloads"]] == ["who/tiny"]
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("who/tiny") == 2
    assert main(["remove", "who/tiny"]) == 0
    assert not copy.exists()
    assert snapshot.is_dir()
    assert main(["remove", "who/tiny", "--download"]) == 0
    assert "removed the download of who/tiny" in capsys.readouterr().err
    assert not repo.exists()
