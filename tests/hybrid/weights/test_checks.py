"""What is known of a checkpoint before work starts: links, indexes, side files, damage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from checkpoints import (
    INDEX,
    WEIGHTS,
    edit_config,
    read_weights,
    refused,
    write_json,
    write_weights,
)
from hybrid.ask.names import directory_name
from hybrid.cli import main
from hybrid.errors import CheckpointError
from hybrid.formats.errors import HybridError
from hybrid.weights.checkpoint import convert
from hybrid.weights.checks import CHECKS, Checkpoint, check_files, findings
from hybrid.weights.config import HybridConfig


def split(src: Path, names: tuple[str, str]) -> dict[str, str]:
    """Put a model's weights into two files with an index; return which tensor is in which."""
    weights = read_weights(src)
    (src / WEIGHTS).unlink()
    keys = sorted(weights)
    halves = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
    for name, half in halves.items():
        save_file({key: weights[key] for key in half}, src / name, metadata={"format": "pt"})
    where = {key: name for name, half in halves.items() for key in half}
    write_json(src / INDEX, {"weight_map": where})
    return where


TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_links(src: Path, tmp_path: Path) -> None:
    """A link that leads nowhere is named, with where it led; one that leads somewhere will do."""
    kept = tmp_path / "blob"
    (src / WEIGHTS).rename(kept)
    (src / WEIGHTS).symlink_to(kept)
    assert check_files(Checkpoint(src)) == []
    kept.unlink()
    assert f"{WEIGHTS} is a link to {kept}, which is not there" in refused(src).message


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_names_that_are_no_text(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries take no such path: said so, and not that the tokenizer is missing."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfemodel"))
    src.rename(odd)
    error = refused(odd)
    assert "udcff" in error.message
    assert "is not valid utf-8" in error.message
    assert "rename" in str(error)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "PYTHONUTF8=1" in str(refused(odd))


def test_git_lfs_pointer(src: Path) -> None:
    """What Git leaves where a large file was not fetched."""
    (src / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    error = refused(src)
    assert "is a Git LFS pointer" in error.message
    assert "git lfs pull" in str(error)


def test_stale_index(src: Path) -> None:
    """An index of other files than those that are there; the hint names these."""
    where = split(src, TWO)
    assert check_files(Checkpoint(src)) == []
    write_json(
        src / INDEX, {"weight_map": dict.fromkeys(where, "model-00001-of-00001.safetensors")}
    )
    error = refused(src)
    assert "has 0 of the 1 weight files that its index names" in error.message
    assert f"the index does not name {TWO[0]}, {TWO[1]}" in str(error)


def test_files_of_another_checkpoint(src: Path) -> None:
    """An index that names a tensor which no file has: one of them is of another checkpoint."""
    where = split(src, TWO)
    write_json(src / INDEX, {"weight_map": where | {"model.layers.9.q.weight": TWO[1]}})
    error = refused(src)
    assert (
        f"names 1 tensors that its files do not have, such as model.layers.9.q.weight in {TWO[1]}"
        in error.message
    )
    assert "of another checkpoint" in str(error)


def test_missing_shard_without_an_index(src: Path) -> None:
    """Numbered files tell how many there should be."""
    split(src, TWO)
    (src / INDEX).unlink()
    assert check_files(Checkpoint(src)) == []
    (src / TWO[0]).unlink()
    assert "has 1 of 2 weight files" in refused(src).message


def test_weights_beside_those_that_are_used(src: Path, tmp_path: Path) -> None:
    """Of two sets of weights the one that transformers takes is taken, and that is said."""
    whole = (src / WEIGHTS).read_bytes()
    split(src, TWO)
    (src / WEIGHTS).write_bytes(whole)
    assert check_files(Checkpoint(src)) == [f"not used: {TWO[0]}, {TWO[1]}, beside {WEIGHTS}"]
    assert Checkpoint(src).files == [src / WEIGHTS]


def test_other_kinds_of_weights(src: Path) -> None:
    """A directory without safetensors is told by what it has instead."""
    (src / WEIGHTS).rename(src / "pytorch_model.bin")
    assert f"neither {WEIGHTS} nor several files, but pytorch_model.bin" in refused(src).message


def test_snapshot_of_the_hub(src: Path, tmp_path: Path) -> None:
    """It is called by its repository; the folder around it says where the model is."""
    hub = tmp_path / "models--org--tiny-moe"
    snapshot = hub / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    src.rename(snapshot)
    assert directory_name(snapshot) == "tiny-moe"
    told: list[str] = []
    made = convert(snapshot, tmp_path / "dst", tell=told.append)
    assert json.loads((made.path / "experts.json").read_text())["source"]["name"] == "tiny-moe"
    shutil.copy(snapshot / "config.json", hub / "config.json")
    assert f"give {snapshot}" in str(refused(hub))


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "generation_config.json", "tokenizer_config.json"]
)
def test_json_nested_without_end(src: Path, name: str) -> None:
    """Files that Python's own parser gives up on are named."""
    if name == INDEX:
        (src / WEIGHTS).rename(src / TWO[0])
    (src / name).write_text("[" * 100_000)
    assert f"{name} is not valid JSON: nested too deep" in refused(src).message


def test_all_at_once(src: Path) -> None:
    """Each check has its say, and what hinders several is said once."""
    (src / WEIGHTS).write_bytes(b"short")
    (src / "generation_config.json").write_text("[1]")
    (src / "tokenizer_config.json").write_text("[2]")
    errors, notes = findings(Checkpoint(src), CHECKS)
    assert notes == []
    assert [error.message.split(" ", 1)[1][:20] for error in errors] == [
        "is not a whole safet",
        "holds a list, not a ",
        "holds a list, not a ",
    ][: len(errors)]
    assert len(errors) >= 2


# -- commands -----------------------------------------------------------------------------------


def test_check_command(src: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """``hybrid convert --check`` says what would be made, or all that hinders it."""
    assert main(["convert", str(src), "--check", "--verify"]) == 0
    assert f"{src} can be converted: 16 experts in 2 layers" in capfd.readouterr().err
    (src / "generation_config.json").write_text("[1]")
    edit_config(src, quantization_config={"quant_method": "awq"})
    assert main(["convert", str(src), "--check"]) == 2
    told = capfd.readouterr().err
    assert told.count("error: ") == 2
    assert "quantized with awq" in told
    assert "generation_config.json holds a list" in told
    assert main(["convert", str(src)]) == 2
    assert "DST is missing" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_plan_tells_what_hinders_a_run(src: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The plan is printed all the same: it needs no weights."""
    plan = ["plan", str(src), "--hardware", "rtx4060-laptop"]
    assert main(plan) == 0
    assert "cannot be run as it is" not in capfd.readouterr().err
    (src / WEIGHTS).write_bytes(b"cut")
    assert main(plan) == 0
    told = capfd.readouterr()
    assert "cannot be run as it is: " in told.err
    assert "is not a whole safetensors file" in told.err
    assert told.out
    (src / WEIGHTS).unlink()  # a config alone is enough
    assert main(plan) == 0
    assert "cannot be run as it is" not in capfd.readouterr().err


# -- converted directories ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny_model, tmp_path_factory.mktemp("converted") / "model").path


@pytest.mark.parametrize("change", [{"scale": 2}, {"experts": ["q4_0"]}, {"store": 5}])
def test_unknown_settings_of_a_conversion(
    converted: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """By us and by transformers alike they are refused by name."""
    dst = shutil.copytree(converted, tmp_path / "dst")
    settings = json.loads((dst / "config.json").read_text())["quantization_config"]
    edit_config(dst, quantization_config=settings | change)
    (name,) = change
    for load in (HybridConfig.for_loading, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError, match=f"quantization_config .* has {name} = "
        ) as caught:
            load(dst)
        assert caught.value.hint


def _lose_a_tensor(dst: Path) -> None:
    weights = read_weights(dst)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    write_weights(dst, weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda dst: (dst / WEIGHTS).unlink(), "neither model.safetensors"),
        (lambda dst: (dst / WEIGHTS).write_bytes(b"cut"), "not a whole safetensors file"),
        (lambda dst: (dst / "experts.json").write_text("[" * 100_000), "nested too deep"),
        (_lose_a_tensor, "lack 1 tensors of the model: model.layers.1.self_attn.k_proj.weight"),
    ],
)
def test_damaged_conversion(
    converted: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """What transformers ends in a traceback for, or makes up, is refused by name."""
    from hybrid.loading import load_fast_model

    dst = shutil.copytree(converted, tmp_path / "dst")
    damage(dst)
    with pytest.raises(HybridError, match=message) as caught:
        load_fast_model(dst)
    assert caught.value.hint
