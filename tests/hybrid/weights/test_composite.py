"""Composite models: the class that is converted is the one that is loaded, for text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import edit_config, read_weights
from hybrid.errors import UnsupportedModelError
from hybrid.loading import load_fast_model
from hybrid.weights.checkpoint import convert
from hybrid.weights.source import Source
from tiny_families import VOCAB, multimodal, tiny_config

IDS = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(0))


def save(name: str, directory: Path, **changes: Any) -> torch.Tensor:
    """Write a random composite model; return its logits."""
    kind, model_kind = multimodal(name)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_kind._from_config(
            tiny_config(kind, **changes), experts_implementation="eager"
        ).eval()
    model.save_pretrained(directory)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_a_model_without_a_class_for_text_alone_leaves_its_towers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text is computed as by all of it; images are refused; it is said once."""
    expected = save("qwen3_vl_moe", tmp_path / "src")
    said: list[str] = []
    convert(tmp_path / "src", tmp_path / "dst", experts="f32", tell=said.append)
    assert sum("src (qwen3_vl_moe) is for more than text" in line for line in said) == 1
    assert any("visual" in key for key in read_weights(tmp_path / "src"))
    assert not any("visual" in key for key in read_weights(tmp_path / "dst"))
    model, _ = load_fast_model(tmp_path / "dst", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert "more than text" not in capsys.readouterr().err
    with pytest.raises(UnsupportedModelError, match="text only"):
        model.model.visual(IDS)


def test_packed_dense_weights_are_found_under_either_prefix(tmp_path: Path) -> None:
    """What was packed of the text model also loads as that of the whole one."""
    expected = save("qwen3_5_moe", tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", experts="q8_0", dense="q8_0")
    assert "model.embed_tokens.packed" in read_weights(tmp_path / "dst")
    whole = multimodal("qwen3_5_moe")["qwen3_5_moe"][1]
    kinds = (AutoModelForCausalLM, whole)
    models = [kind.from_pretrained(tmp_path / "dst", dtype=torch.float32) for kind in kinds]
    assert type(models[0]).__name__ == "Qwen3_5MoeForCausalLM"
    torch.testing.assert_close(logits(models[1]), logits(models[0]))
    assert (logits(models[0]) - expected).abs().median() < 0.1 * expected.std()


@pytest.mark.parametrize("names", [None, [], ["NobodyHasThisForCausalLM"], ["Qwen3MoeModel"]])
def test_architectures_decide_nothing(names: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Absent, null, empty or unknown: the model type says which class writes text."""
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    if names is None:
        raw = json.loads((tmp_path / "config.json").read_text())
        del raw["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert type(Source.open(tmp_path).empty_model()).__name__ == "Qwen3MoeForCausalLM"
    edit_config(tmp_path, architectures=names)
    assert type(Source.open(tmp_path).empty_model()).__name__ == "Qwen3MoeForCausalLM"
