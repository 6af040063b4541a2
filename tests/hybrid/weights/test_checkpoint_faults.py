"""Bad input: each kind of damage raises its own clear error, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import WEIGHTS, edit_config, read_weights, write_weights
from hybrid import HybridConfig
from hybrid.errors import (
    CheckpointError,
    DiskSpaceError,
    HybridError,
    StoreError,
    UnsupportedModelError,
    UsageError,
)
from hybrid.weights.checkpoint import convert
from hybrid.weights.expert_writer import _Block
from hybrid.weights.store import DATA_NAME, INDEX_NAME

EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture
def src(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_model, tmp_path / "src")


@pytest.fixture(scope="module")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(tiny_model, folder / "model")
    return folder / "model"


@pytest.fixture
def dst(converted: Path, tmp_path: Path) -> Path:
    """A copy of a converted directory to damage."""
    return shutil.copytree(converted, tmp_path / "dst")


def refused(src: Path, kind: type[HybridError], message: str, **options: Any) -> HybridError:
    """Convert ``src``; expect the error, a hint, an untouched source and no destination."""
    before = _content(src)
    with pytest.raises(kind, match=message) as caught:
        convert(src, src.parent / "out", **options)
    assert caught.value.hint
    assert _content(src) == before
    assert not (src.parent / "out").exists()
    return caught.value


def _content(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and os.access(p, 4)}


def test_missing_directory(tmp_path: Path) -> None:
    """A path that does not exist."""
    refused(tmp_path / "nowhere", CheckpointError, "there is no model directory")


def test_empty_directory(tmp_path: Path) -> None:
    """A directory with nothing in it."""
    (tmp_path / "src").mkdir()
    refused(tmp_path / "src", CheckpointError, "cannot read .*config.json: No such file")


def test_no_weights(src: Path) -> None:
    """A config without weights."""
    (src / WEIGHTS).unlink()
    refused(src, CheckpointError, "holds no safetensors weights")


@pytest.mark.parametrize(
    ("settings", "file", "message"),
    [
        ({"architectures": ["Qwen3Model"]}, None, r"without a head .*\(Qwen3Model\)"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, None, "without a head"),
        ({}, "config_sentence_transformers.json", "is an embedding model"),
        ({"model_type": "bert", "architectures": None}, None, "no class that writes text"),
    ],
)
def test_models_that_write_no_text(
    src: Path, settings: dict[str, Any], file: str | None, message: str
) -> None:
    """A model without a head, one that embeds texts and an encoder are refused by name."""
    edit_config(src, **settings)
    if file:
        (src / file).write_text("{}")
    refused(src, UnsupportedModelError, message)


def test_unknown_architecture(src: Path) -> None:
    """A model type that transformers does not know."""
    edit_config(src, model_type="mystery", architectures=["MysteryForCausalLM"])
    refused(src, CheckpointError, "transformers .* cannot use .*config.json")


def test_other_quantization(src: Path) -> None:
    """A source quantized in a way that cannot be undone."""
    edit_config(src, quantization_config={"quant_method": "gptq", "bits": 3})
    refused(src, UnsupportedModelError, "quantized with gptq .3 bits., says config.json")


def test_converted_already(dst: Path) -> None:
    """A converted directory is not a source."""
    refused(dst, CheckpointError, "is converted already: its experts are in q4_0")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_weights(src: Path, keep: int) -> None:
    """A weight file that ends early: in the length, the header or the data."""
    raw = (src / WEIGHTS).read_bytes()
    (src / WEIGHTS).write_bytes(raw[:keep])
    refused(src, CheckpointError, "is not a whole safetensors file|is cut short|damaged")


def test_longer_weights(src: Path) -> None:
    """Bytes after the end are damage too."""
    with (src / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(src, CheckpointError, "is too long: its header describes")


def test_flipped_bits_in_a_header(src: Path, tiny_model: Path, tmp_path: Path) -> None:
    """One flipped bit anywhere in a header is an error, or changed nothing that counts."""
    raw = (src / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    expected = _content_by_name(convert(tiny_model, tmp_path / "clean").path)
    for n, at in enumerate(range(0, 8 + length, (8 + length) // 60)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << n % 7
        (src / WEIGHTS).write_bytes(damaged)
        out = tmp_path / f"out{n}"
        with contextlib.suppress(CheckpointError):
            convert(src, out)
        if out.exists():
            found = _content_by_name(out)
            assert found["model.safetensors"] == expected["model.safetensors"]
            assert found[DATA_NAME][4096:] == expected[DATA_NAME][4096:]


def _content_by_name(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("key", [EXPERT, "model.norm.weight"])
def test_flipped_bits_in_values(src: Path, key: str) -> None:
    """Bits that turn a weight into NaN or infinity are found without any digest."""
    weights = read_weights(src)
    weights[key].view(-1)[3] = float("nan")
    write_weights(src, weights)
    refused(src, CheckpointError, "hold inf or NaN|holds NaN", experts="bf16")


def test_missing_expert(src: Path) -> None:
    """One expert's tensor is missing: the error says which."""
    weights = read_weights(src)
    del weights[EXPERT]
    write_weights(src, weights)
    error = refused(src, CheckpointError, "has 7 of 8 tensors like .*up_proj")
    assert "expert 5's is missing" in str(error)


def test_missing_layer_of_experts(src: Path) -> None:
    """All experts of a layer are missing."""
    kept = {k: w for k, w in read_weights(src).items() if "layers.1.mlp.experts" not in k}
    write_weights(src, kept)
    refused(src, CheckpointError, r"no tensor for model.layers.1.mlp.experts.gate_up_proj \[8, 64")


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.k_proj.weight", "lm_head.weight"])
def test_missing_dense_tensor(src: Path, key: str) -> None:
    """A dense tensor is missing."""
    weights = read_weights(src)
    del weights[key]
    write_weights(src, weights)
    refused(src, CheckpointError, f"the checkpoint has no tensor for {key}")


@pytest.mark.parametrize("config", [{}, {"quant_method": "fp8", "weight_block_size": [32, 32]}])
@pytest.mark.parametrize("key", ["model.layers.0.self_attn.k_proj.weight", EXPERT])
def test_missing_scales(src: Path, key: str, config: dict[str, Any]) -> None:
    """An fp8 weight without its scales is not taken at face value."""
    weights = read_weights(src)
    weights[key] = weights[key].to(torch.float8_e4m3fn)
    if key == EXPERT:  # one expert alone would already differ from the others
        for other in [k for k in weights if "layers.1.mlp.experts" in k]:
            weights[other] = weights[other].to(torch.float8_e4m3fn)
    write_weights(src, weights)
    if config:
        edit_config(src, quantization_config=config)
    refused(src, CheckpointError, "is torch.float8_e4m3fn in the checkpoint, without scales")


def test_missing_file(src: Path) -> None:
    """The index names a file that is not there."""
    weight_map = {EXPERT: "model-00002-of-00002.safetensors", "lm_head.weight": WEIGHTS}
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(src, CheckpointError, "has 1 of the 2 weight files .*missing: model-00002")


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (EXPERT, [32, 60], r"expert 5 .*|do not make model.layers.1.mlp.experts.gate_up_proj"),
        (
            "model.layers.0.mlp.experts.2.down_proj.weight",
            [64, 30],
            r"expert 2 of .*down_proj is \[1, 64, 30\] in the checkpoint, .* \[1, 64, 32\]",
        ),
        ("lm_head.weight", [200, 64], r"lm_head.weight is \[200, 64\] .* takes \[256, 64\]"),
    ],
)
def test_wrong_shape(src: Path, key: str, shape: list[int], message: str) -> None:
    """A tensor has another shape than the config asks for."""
    weights = read_weights(src)
    weights[key] = torch.zeros(shape, dtype=torch.bfloat16)
    write_weights(src, weights)
    refused(src, CheckpointError, message)


def test_damaged_json(src: Path) -> None:
    """A config that is cut off."""
    config = (src / "config.json").read_text()
    (src / "config.json").write_text(config[:40])
    refused(src, CheckpointError, "config.json is not valid JSON")


@pytest.mark.parametrize("options", [{"experts": "q5_x"}, {"dense": "int3"}])
def test_unknown_format(src: Path, options: dict[str, str]) -> None:
    """An unknown format is refused with the list of known ones."""
    (name,) = options.values()
    error = refused(src, UsageError, f"unknown format .*'{name}'", **options)
    assert "choose one of" in str(error)
    with pytest.raises(UsageError, match="unknown format"):
        HybridConfig(**options)


def test_destination_exists(src: Path, tmp_path: Path) -> None:
    """A destination with anything in it is left alone; an empty one is used."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(UsageError, match="out exists"):
        convert(src, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "data"
    (tmp_path / "empty").mkdir()
    convert(src, tmp_path / "empty")
    assert (tmp_path / "empty" / DATA_NAME).exists()


def test_too_little_room(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space is compared with what will be written before anything is."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    refused(src, DiskSpaceError, "has 1.0 KiB free, the conversion writes .* KiB more")
    assert not list((src.parent / "out.partial").glob("*.bin"))


def test_disk_full_on_the_way(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while writing: an error, what is complete is kept and used later."""
    writes = iter(range(100_000))
    write = _Block.write

    def write_until_full(self: _Block, data: Any) -> None:
        if next(writes) > 45:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(_Block, "write", write_until_full)
        error = refused(src, DiskSpaceError, "the disk of .* is full")
    assert "run the same command again" in str(error)
    assert convert(src, tmp_path / "out", verify=True).resumed_layers == 1


@pytest.fixture
def no_permission(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Take away the right to read a file, also from root, who reads whatever the mode says."""
    taken: list[Path] = []

    def take(path: Path) -> None:
        taken.append(path)
        path.chmod(0)
        if os.access(path, os.R_OK):
            opener = Path.open

            def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
                if self == path:
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return opener(self, *args, **kwargs)

            monkeypatch.setattr(Path, "open", refuse)

    yield take
    for path in taken:
        path.chmod(0o644)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_no_permission_to_read(src: Path, name: str, no_permission: Callable[[Path], None]) -> None:
    """A file that may not be read."""
    no_permission(src / name)
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}: Permission denied"):
        convert(src, src.parent / "out")
    assert not (src.parent / "out").exists()


def test_no_permission_to_read_the_store(dst: Path, no_permission: Callable[[Path], None]) -> None:
    """The experts may not be read."""
    no_permission(dst / DATA_NAME)
    with pytest.raises(StoreError, match=r"cannot read .*experts.bin: Permission denied"):
        AutoModelForCausalLM.from_pretrained(dst)


def test_no_permission_to_write(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination may not be written."""
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "out.partial":
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(src, UsageError, "cannot write .*out.partial: Permission denied")


def _cut(folder: Path) -> None:
    with (folder / DATA_NAME).open("r+b") as file:
        file.truncate(9000)


def _swap_store(folder: Path) -> None:
    """Bring in both files of a store made from the same weights in another format."""
    other = folder.parent / "other"
    convert(folder.parent / "src", other, experts="q8_0")
    for name in (DATA_NAME, INDEX_NAME):
        shutil.copy(other / name, folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / DATA_NAME).unlink(), r"cannot read .*experts.bin"),
        (lambda f: (f / INDEX_NAME).unlink(), r"cannot read .*experts.json"),
        (_cut, r"experts.bin should have \d+ bytes, it has 9000"),
        (_swap_store, r"belongs to another model: it is store .*, config.json asks for store"),
        (
            lambda f: edit_config(f, num_hidden_layers=1),
            r"has experts for 2 layers .* the model has 1",
        ),
        (
            lambda f: edit_config(f, moe_intermediate_size=64),
            r"belongs to another model: .* \(8, 64, 32, True, False\) there, \(8, 64, 64,",
        ),
    ],
)
def test_damaged_converted_directory(
    src: Path, dst: Path, damage: Callable[[Path], None], message: str
) -> None:
    """Loading a converted directory whose store is missing, cut or not its own."""
    damage(dst)
    with pytest.raises(StoreError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(dst)
    assert caught.value.hint


def test_flipped_bit_in_a_converted_directory(dst: Path) -> None:
    """``verify`` finds it at loading."""
    with (dst / DATA_NAME).open("r+b") as file:
        file.seek(6000)
        file.write(b"\xff\x00\xff")
    AutoModelForCausalLM.from_pretrained(dst)
    with pytest.raises(StoreError, match="differ from their checksums"):
        AutoModelForCausalLM.from_pretrained(dst, quantization_config=HybridConfig(verify=True))


def test_other_format_is_asked_for(dst: Path) -> None:
    """A converted directory has one format; asking for another is an error, not ignored."""
    with pytest.raises(UsageError, match="is converted with experts='q4_0', experts='q8_0'"):
        AutoModelForCausalLM.from_pretrained(dst, quantization_config=HybridConfig("q8_0"))
