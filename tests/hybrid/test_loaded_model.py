"""Model: what a loaded network is, derived once, and read in one place."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hybrid.model
from hybrid.errors import UsageError
from hybrid.fast.attach import FastPath
from hybrid.model import Model
from hybrid.packed.experts import LayerExperts
from hybrid.weights.checkpoint import convert
from planner.describe.families import from_hf_config
from tiny_families import families, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Path:
    convert(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_read_from_its_network(directory: Path) -> None:
    """Store, formats, experts and fast path; of a copy, the copy's own."""
    network = AutoModelForCausalLM.from_pretrained(directory)
    model, twin = Model(network), Model(copy.deepcopy(network))
    assert model.directory == directory
    assert model.index.format == "q4_0"
    assert model.dense_format == "as in the checkpoint"
    assert (
        model.weights == json.loads((directory / "experts.json").read_text())["source"]["identity"]
    )
    assert {type(layer) for layer in model.layers} == {LayerExperts}
    assert len(model.layers) == model.spec.moe_layers
    assert isinstance(model.fast, FastPath)
    assert model.context == model.spec.context
    assert twin.fast is not model.fast
    assert all(a is not b for a, b in zip(twin.layers, model.layers, strict=True))
    assert twin.index == model.index


def test_the_counts_are_derived_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks after that gets the same value, though the directory has gone."""
    calls = []
    real = hybrid.model.find_model

    def counted(where: Path) -> object:
        calls.append(where)
        return real(where)

    monkeypatch.setattr(hybrid.model, "find_model", counted)
    model = Model(AutoModelForCausalLM.from_pretrained(directory))
    assert model.spec is model.spec
    assert calls == [directory]
    other = Model(model.network)
    directory.rename(directory.with_name("elsewhere"))
    assert model.spec is model.asked.spec
    with pytest.raises(UsageError, match="model is there no more"):
        _ = other.spec


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4_text"])
def test_a_directory_says_what_the_loaded_config_says(kind: str, tmp_path: Path) -> None:
    """The counts of ``config.json`` are those of the config that transformers makes of it."""
    config = tiny_config(families()[kind][0])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    loaded = type(config).from_pretrained(tmp_path)
    assert from_hf_config(written, kind) == from_hf_config(loaded.to_dict(), kind)


def test_nobody_else_derives_the_counts() -> None:
    """``from_hf_config`` is called where models are asked for, and nowhere else in the package."""
    callers = {
        path.relative_to(ROOT / "hybrid").parts[0]
        for path in (ROOT / "hybrid").rglob("*.py")
        if "from_hf_config(" in path.read_text(encoding="utf-8")
    }
    assert callers == {"ask"}
