"""A repository that is converted while it comes, in little room, whatever ends it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import INDEX, WEIGHTS, read_weights, write_json
from gguf_files import recipe, write_gguf
from hybrid.cli import main
from hybrid.errors import CheckpointError
from hybrid.formats.errors import HybridError
from hybrid.hub.fetch import directory_of, manifest
from hybrid.hub.names import HubName
from hybrid.weights import arriving
from hybrid.weights.arriving import ArrivingCheckpoint
from hybrid.weights.checkpoint import convert
from hybrid.weights.huge_pages import AlignedWriter
from local_hub import Hub, serving

NAME = "maker/tiny-moe"


def _file_of(key: str) -> str:
    """Layers of their own, with an embedding in the first and a head in the last."""
    layer = key.split(".")[2] if ".layers." in key else "0" if "embed" in key else "1"
    return f"model-0000{int(layer) + 1}-of-00002.safetensors"


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in a file for each layer."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    files: dict[str, dict[str, torch.Tensor]] = {}
    weights = read_weights(folder)
    for key, tensor in weights.items():
        files.setdefault(_file_of(key), {})[key] = tensor
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    write_json(folder / INDEX, {"metadata": {}, "weight_map": {k: _file_of(k) for k in weights}})
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as served:
        served.publish(NAME, sharded)
        yield served


def _content(folder: Path) -> dict[str, bytes]:
    """All files; of the index all but the source's digest, which the store is named by."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["experts.bin"] = found["experts.bin"][4096:]
    for name in ("experts.json", "config.json"):
        table = json.loads(found.pop(name))
        table.pop("id", None), table.pop("source", None)
        table.get("quantization_config", {}).pop("store", None)
        found[name] = json.dumps(table).encode()
    return found


def _piecewise(tmp_path: Path, told: Callable[[str], None] = lambda _: None) -> Path:
    dst = tmp_path / "dst"
    checkpoint = ArrivingCheckpoint(manifest(HubName(NAME)), tmp_path / "dst.source")
    convert(checkpoint, dst, tell=told, verify=True)
    return dst


def test_the_same_as_of_a_whole_download(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    """Every file is fetched once, and nothing of them is left."""
    dst = _piecewise(tmp_path)
    convert(sharded, tmp_path / "clean")
    assert _content(dst) == _content(tmp_path / "clean")
    assert not (tmp_path / "dst.source").exists()
    assert hub.sent.count(INDEX) == 1
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert hub.sent.count(name) == 2  # the header, and the file


def test_files_go_when_they_are_packed(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but what is no expert's is left of a file, and the peak that is told holds."""
    left: list[dict[str, int]] = []
    before = ArrivingCheckpoint.layer_done

    def layer_done(self: ArrivingCheckpoint, layer: int) -> None:
        before(self, layer)
        left.append({p.name: p.stat().st_blocks * 512 for p in (self.path / "packed").iterdir()})
        there = {p.name for p in (self.path / "arriving").glob("*.safetensors")}
        assert not there & set(left[-1])

    monkeypatch.setattr(ArrivingCheckpoint, "layer_done", layer_done)
    told: list[str] = []
    _piecewise(tmp_path, told.append)
    assert [len(each) for each in left] == [1, 2]
    dense = sum(t.nbytes for k, t in read_whole(sharded).items() if "experts" not in k)
    assert sum(left[-1].values()) < dense + 2 * 64 * 1024
    assert sum("on disk at most" in line for line in told) == 1


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def test_the_peak_is_that_of_two_files(hub: Hub, tmp_path: Path) -> None:
    """By hand: both files are there at first, the one is packed while the other comes."""
    wanted = manifest(HubName(NAME))
    checkpoint = ArrivingCheckpoint(wanted, tmp_path / "source")
    keys = list(checkpoint.tensors)
    layers = [[k for k in keys if f".{n}.mlp.experts." in k] for n in range(2)]
    checkpoint.expect(layers, [key for key in keys if "mlp.experts" not in key])
    one, two = (wanted.files[f"model-0000{n}-of-00002.safetensors"] for n in (1, 2))
    thin = [
        sum(i.nbytes for k, i in checkpoint.tensors.items() if k not in {*layers[0], *layers[1]}
            and i.path.name.startswith(f"model-0000{n}"))
        for n in (1, 2)
    ]  # fmt: skip
    assert checkpoint.peak_bytes([1000, 10], 5) == max(
        one + two + 1000, thin[0] + two + 1010, sum(thin) + 1010 + 5
    )
    huge = 10**9
    assert checkpoint.peak_bytes([10, huge], 5) == max(
        thin[0] + two + huge + 10, sum(thin) + huge + 15
    )


def test_by_the_command(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--keep-source no says the peak; of what is no such repository it says why it cannot."""
    dst = tmp_path / "out"
    assert main(["convert", NAME, str(dst), "--keep-source", "no"]) == 0
    said = capsys.readouterr().err
    assert "on disk at most" in said
    assert "to download" in said
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    cached = [file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert max(cached) < min(len(hub.files[NAME][n]) for n in hub.files[NAME] if "model-" in n)
    assert main(["convert", str(dst), str(tmp_path / "b"), "--keep-source", "no"]) == 2
    assert "is no name of the hub" in capsys.readouterr().err
    assert main(["convert", NAME, "--check", "--keep-source", "no"]) == 2
    assert main(["convert", NAME, str(tmp_path / "b"), "--keep-source", "maybe"]) == 2


def test_a_file_that_changes_meanwhile(hub: Hub, tmp_path: Path) -> None:
    """What comes is not what the header came of: said, and not packed."""
    checkpoint = ArrivingCheckpoint(manifest(HubName(NAME)), tmp_path / "source")
    name = "model-00001-of-00002.safetensors"
    hub.files[NAME][name] = hub.files[NAME]["model-00002-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match="is not the file whose header came before"):
        convert(checkpoint, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def _counted(
    patch: pytest.MonkeyPatch, at: int, end: Callable[[], None], *, writing: bool = False
) -> list[int]:
    """Call ``end`` before the ``at``-th step that changes the disk, or of those that need room."""
    seen = [0]

    def step() -> None:
        seen[0] += 1
        if seen[0] == at:
            end()

    def counting(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def after(*args: Any, **options: Any) -> Any:
            step()
            return before(*args, **options)

        patch.setattr(owner, name, after)

    for owner, name in (
        *((os, "fsync"), (Path, "write_text"), (shutil, "copyfile"), (AlignedWriter, "write")),
        *((arriving, "fetch_file"), (arriving, "_write_with_holes")),
        *(() if writing else ((os, "replace"), (Path, "rename"), (Path, "unlink"))),
        *(() if writing else ((ArrivingCheckpoint, "layer_done"), (Path, "mkdir"))),
    ):
        counting(owner, name)
    return seen


def _make(kind: str, tmp_path: Path, sharded: Path) -> None:
    if kind == "hub, piecewise":
        _piecewise(tmp_path)
    elif kind == "hub":
        convert(directory_of(HubName(NAME)), tmp_path / "dst", verify=True)
    else:
        convert(tmp_path / "tiny.gguf", tmp_path / "dst", verify=True)


KINDS = ("hub, piecewise", "hub", "gguf")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "gguf":
        write_gguf(tmp_path / "tiny.gguf", recipe("qwen3moe"), matrices="Q8_0")
    return str(request.param)


def _clean(kind: str, tmp_path: Path, sharded: Path) -> dict[str, bytes]:
    src = tmp_path / "tiny.gguf" if kind == "gguf" else sharded
    convert(src, tmp_path / "clean")
    return _content(tmp_path / "clean")


def _steps(
    kind: str, tmp_path: Path, sharded: Path, patch: pytest.MonkeyPatch, *, writing: bool = False
) -> int:
    """Count the steps of a run to the end, and remove what it made."""
    with patch.context() as counting:
        seen = _counted(counting, -1, lambda: None, writing=writing)
        _make(kind, tmp_path, sharded)
    shutil.rmtree(tmp_path / "dst")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    return seen[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_ten_points(
    kind: str, hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL leaves no destination that is not whole; the next run ends as if there was none."""
    expected = _clean(kind, tmp_path, sharded)
    total = _steps(kind, tmp_path, sharded, monkeypatch)
    assert total > 10
    for at in sorted({1 + part * (total - 1) // 9 for part in range(10)}):
        child = os.fork()
        if child == 0:
            try:
                _counted(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                _make(kind, tmp_path, sharded)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or (tmp_path / "dst").is_dir(), at
        assert not (tmp_path / "dst").exists() or _content(tmp_path / "dst") == expected
        if not (tmp_path / "dst").exists():
            _make(kind, tmp_path, sharded)
        assert _content(tmp_path / "dst") == expected, at
        assert {path.name for path in tmp_path.glob("dst.*")} <= {"dst.lock"}
        (tmp_path / "dst.lock").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "dst")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_the_disk_is_full_at_ten_points(
    kind: str, hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error in our words; with room again the same command ends as if there always was."""
    expected = _clean(kind, tmp_path, sharded)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    total = _steps(kind, tmp_path, sharded, monkeypatch, writing=True)
    said = []
    for at in sorted({1 + part * (total - 1) // 9 for part in range(10)}):
        with monkeypatch.context() as patch:
            _counted(patch, at, full, writing=True)
            try:
                _make(kind, tmp_path, sharded)
            except HybridError as error:
                said.append(str(error))
        if not (tmp_path / "dst").exists():
            _make(kind, tmp_path, sharded)
        assert _content(tmp_path / "dst") == expected, f"{at}: {said}"
        shutil.rmtree(tmp_path / "dst")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert len(said) >= 8  # the hub's client goes on without what it can do without
    assert all("hint: " in line and re.search("full|No space left", line) for line in said)
