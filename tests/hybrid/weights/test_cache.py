"""Copies in the cache: their side files are the checkpoint's own of now, and old ones go."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from checkpoints import edit_config, read_weights, write_weights
from hybrid.errors import CheckpointError, UsageError
from hybrid.weights.cache import converted_copy
from hybrid.weights.store import DATA_NAME


@pytest.fixture
def src(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "src")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def copy_of(src: Path, home: Path, experts: str = "q4_0") -> Path:
    return converted_copy(src, experts, None, home)[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_notes(*copies: Path) -> list[str]:
    return sorted(f"{copy.name}{end}" for copy in copies for end in ("", ".json"))


def test_side_files_are_those_of_now(src: Path, home: Path) -> None:
    """Files that were edited, added or removed after the first run are so in the copy, too."""
    (src / "generation_config.json").write_text("{}")
    (src / "NOTICE").write_text("old")
    copy = copy_of(src, home)
    written = (copy / DATA_NAME).stat().st_mtime_ns
    (src / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (src / "chat_template.jinja").write_text("{{ messages }}")
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates" / "tool.jinja").write_text("tools")
    (src / "NOTICE").unlink()
    assert copy_of(src, home) == copy
    assert (copy / DATA_NAME).stat().st_mtime_ns == written
    for name in ("generation_config.json", "additional_chat_templates/tool.jinja"):
        assert (copy / name).read_bytes() == (src / name).read_bytes()
    assert set(names(copy)) - set(names(src)) == {DATA_NAME, "experts.json"}
    assert set(names(src)) <= set(names(copy))


def test_side_files_in_a_cache_that_is_only_read(
    src: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It will do while nothing changed; then the file is named, and not passed over."""
    copy = copy_of(src, home)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    assert copy_of(src, home) == copy
    (src / "NOTICE").write_text("new")
    with pytest.raises(UsageError, match=r"NOTICE has changed, .* Read-only file system"):
        copy_of(src, home)


def test_old_copies_go(src: Path, home: Path) -> None:
    """The copy of a checkpoint that has changed goes with all that lay beside it; others stay."""
    others = [copy_of(src, home, "q8_0"), copy_of(shutil.copytree(src, src / ".." / "b"), home)]
    old = copy_of(src, home)
    assert names(home) == sorted(
        {f"{c.name}{end}" for c in (*others, old) for end in ("", ".json")}
    )
    edit_config(src, rope_theta=5e5)
    new = copy_of(src, home)
    assert names(home) == with_notes(new, *others)


def test_what_an_interruption_left_goes(src: Path, home: Path) -> None:
    """So does what is left of a conversion that was killed, once the checkpoint has changed."""
    weights = read_weights(src)
    weights["model.layers.1.mlp.experts.5.up_proj.weight"].view(-1)[3] = float("nan")
    write_weights(src, weights)
    with pytest.raises(CheckpointError, match="inf or NaN"):
        copy_of(src, home)
    assert any(name.endswith(".partial") for name in names(home))
    weights["model.layers.1.mlp.experts.5.up_proj.weight"].view(-1)[3] = 0.0
    write_weights(src, weights)
    os.utime(src / "model.safetensors", ns=(1, 1))
    copy = copy_of(src, home)
    assert names(home) == [copy.name, f"{copy.name}.json"]


def test_a_copy_that_is_being_written_stays(src: Path, home: Path) -> None:
    """Who holds its lock is at work on it."""
    old = copy_of(src, home)
    edit_config(src, rope_theta=5e5)
    with FileLock(str(home / f"{old.name}.wait")):
        new = copy_of(src, home)
    assert old.is_dir()
    assert new.is_dir()


def test_damaged_note(src: Path, home: Path) -> None:
    """A note that says nothing removes nothing."""
    old = copy_of(src, home)
    (home / f"{old.name}.json").write_text("[" * 100_000)
    edit_config(src, rope_theta=5e5)
    new = copy_of(src, home)
    assert old.is_dir()
    assert json.loads((home / f"{new.name}.json").read_text())["experts"] == "q4_0"
