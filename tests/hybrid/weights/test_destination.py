"""Where a conversion writes to: links, mounted disks, the working folder, folders in the source."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hybrid.errors import UsageError
from hybrid.weights.checkpoint import convert
from hybrid.weights.store import DATA_NAME


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_link(there: bool, tiny_model: Path, tmp_path: Path) -> None:
    """What a link leads to is made, beside where it lies, and the link stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "model").mkdir()
    link = tmp_path / "link"
    link.symlink_to(disk / "model")
    assert convert(tiny_model, link).path == link
    assert link.is_symlink()
    assert (disk / "model" / DATA_NAME).is_file()
    assert names(tmp_path) == ["disk", "link"]
    assert names(disk) == ["model"]


def test_working_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be replaced under the feet of a shell; a new folder in it can be made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"\. is the working folder"):
        convert(tiny_model, ".")
    assert names(tmp_path) == ["here"]
    convert(tiny_model, "model")
    assert names(tmp_path / "here") == ["model"]


@pytest.mark.parametrize("how", ["is a mount", "refuses to be renamed"])
def test_mounted_disk(
    how: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder that cannot be replaced is refused before the work, and stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if how == "is a mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    else:
        rename = Path.rename

        def busy(self: Path, target: Path) -> Path:
            if self == disk:
                raise OSError(errno.EBUSY, "Device or resource busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UsageError, match="cannot be replaced by the converted one") as caught:
        convert(tiny_model, disk)
    assert f"name a new folder in it: {disk / 'model'}" in str(caught.value)
    assert names(tmp_path) == ["disk"]
    assert names(disk) == []
    convert(tiny_model, disk / "model")


def test_in_the_source(tiny_model: Path) -> None:
    """A destination in the source is refused, by whatever path it is named."""
    before = names(tiny_model)
    for dst in (tiny_model / "q4", tiny_model / "deep" / "q4", tiny_model / ".." / "tiny" / "q4"):
        with pytest.raises(UsageError, match=r"lies in .*, which is converted"):
            convert(tiny_model, dst)
    assert names(tiny_model) == before


@pytest.mark.parametrize("name", ["x" * 300, "file/model"])
def test_names_that_cannot_be(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """A name that is too long, and a folder below a file."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write") as caught:
        convert(tiny_model, tmp_path / name)
    assert caught.value.hint
    assert names(tmp_path) == ["file"]


def test_permissions_of_an_empty_folder_are_not_needed_twice(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Looking whether an empty folder can be replaced leaves it as it was, whatever comes then."""
    (tmp_path / "dst").mkdir(mode=0o750)
    inode = (tmp_path / "dst").stat().st_ino
    with pytest.raises(UsageError, match="unknown format"):
        convert(tiny_model, tmp_path / "dst", experts="q5")
    assert (tmp_path / "dst").stat().st_ino == inode
    convert(tiny_model, tmp_path / "dst")
    assert names(tmp_path) == ["dst"]
