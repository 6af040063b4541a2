"""Random damage to any file of a model, original or converted: the same text, or its name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import edit_config
from hybrid.formats.errors import HybridError
from hybrid.loading import load_fast_model
from hybrid.weights.checkpoint import check, convert
from hybrid.weights.tokenizer import load_tokenizer

#: What a model is complete without: without it, other text is right.
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
KINDS = ("cut", "bytes", "deep", "list", "html", "empty", "gone", "folder", "link")
BATCHES = range(10)
EACH = 10

Reader = Callable[[Path], Any]


def read_original(folder: Path) -> Any:
    """What a conversion would begin with."""
    tokenizer = load_tokenizer(folder)
    found = check(folder)
    if found.errors:
        raise found.errors[0]
    return tokenizer("hello")["input_ids"], found.expert_bytes, found.dense_bytes


def read_converted(folder: Path) -> Any:
    """What a text is made of."""
    tokenizer = load_tokenizer(folder)
    model, _ = load_fast_model(folder, verify=True, fast=False)
    ids = tokenizer("hello")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits
    return ids, logits.sum().item(), model.generation_config.max_new_tokens


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Reader, Path]:
    """An original and a converted model, by what reads them."""
    folder = tmp_path_factory.mktemp("whole")
    original = shutil.copytree(tiny_model, folder / "original")
    (original / "generation_config.json").write_text('{"max_new_tokens": 8}')
    converted = convert(original, folder / "converted").path
    return {read_original: original, read_converted: converted}


def damage(folder: Path, seed: int) -> tuple[str, str]:
    """Damage one file so that it cannot pass for whole; return its name and what was done."""
    chance = random.Random(seed)
    file = chance.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    kind = chance.choice(
        ("cut", "bytes", "deep", "list", "html", "empty", "gone", "folder", "link")
    )
    if kind == "gone" and file.name in OPTIONAL:
        kind = "empty"
    if kind in ("gone", "folder", "link"):
        file.unlink()
    match kind:
        case "cut":
            file.write_bytes(data[: chance.randrange(len(data))])
        case "bytes":  # weights have no checksums of their own: only what describes them
            described = 8 + int.from_bytes(data[:8], "little")
            end = described if file.suffix == ".safetensors" else len(data)
            data[chance.randrange(end)] = 0xFF  # what no text in UTF-8 has
            file.write_bytes(data)
        case "deep":
            file.write_bytes(b"[" * 100_000)
        case "list":
            file.write_bytes(b"[1, 2]")
        case "html":
            file.write_bytes(b"<html>Not Found</html>")
        case "empty":
            file.write_bytes(b"")
        case "folder":
            file.mkdir()
        case "link":
            file.symlink_to("nowhere")
    return file.name, kind


def answer(read: Reader, folder: Path) -> tuple[Any, HybridError | None]:
    """Return what reading gives, or the error that it ends in: of ours, nothing else."""
    try:
        return read(folder), None
    except HybridError as error:
        return None, error


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("read", [read_original, read_converted])
def test_random_damage(read: Reader, batch: int, whole: dict[Reader, Path], tmp_path: Path) -> None:
    """Nothing but an error that names the file, with a hint, or the very same answer."""
    wanted = read(whole[read])
    for seed in range(batch * EACH, (batch + 1) * EACH):
        folder = shutil.copytree(whole[read], tmp_path / str(seed))
        name, kind = damage(folder, seed)
        found, error = answer(read, folder)
        if error is None:
            assert found == wanted, f"seed {seed}: {name}, {kind}: other text, and no word"
        else:
            assert name in str(error), f"seed {seed}: {name}, {kind}: {error}"
            assert error.hint
        shutil.rmtree(folder)


@pytest.mark.parametrize("value", [None, -1, "x", [1], {"a": 1}])
@pytest.mark.parametrize("read", [read_original, read_converted])
def test_settings_of_odd_kinds(
    read: Reader, value: Any, whole: dict[Reader, Path], tmp_path: Path
) -> None:
    """Whatever a setting of ``config.json`` is made, only errors with a hint come of it."""
    folder = shutil.copytree(whole[read], tmp_path / "odd")
    original = (folder / "config.json").read_bytes()
    for name in ("architectures", "model_type", "num_experts", "head_dim", "rope_parameters"):
        edit_config(folder, **{name: value})
        _, error = answer(read, folder)
        assert error is None or error.hint, name
        (folder / "config.json").write_bytes(original)
