"""Layers that differ: in experts, in how many are chosen, in how they mix tokens."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from checkpoints import edit_config
from hybrid import HybridConfig
from hybrid.ask.asked_model import find_model
from hybrid.ask.config_classes import as_read
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.loading import load_fast_model
from hybrid.weights.checkpoint import convert
from hybrid.weights.sizes import check_layers_alike
from planner.describe.families import from_hf_config
from tiny_families import VOCAB, families, tiny_config

FAMILIES = families()
COUNTS, WIDTHS, CHOSEN = [8, 4, 6], [32, 48, 36], [2, 1, 3]
IDS = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))


class UnequalConfig(Qwen3MoeConfig):
    """A config whose layers have experts of their own, as no class of transformers has it."""

    model_type = "unequal_moe"

    def __init__(self, **settings: Any) -> None:
        sizes = ("num_local_experts", "moe_intermediate_size", "num_experts_per_tok")
        self.of_layers = {name: settings.pop(name, [2]) for name in sizes}
        super().__init__(**{name: most[0] for name, most in self.of_layers.items()}, **settings)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict() | self.of_layers
        settings.pop("of_layers", None)
        return settings


class UnequalForCausalLM(Qwen3MoeForCausalLM):
    config_class = UnequalConfig

    def __init__(self, config: UnequalConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            own = copy.copy(config)
            for name, sizes in config.of_layers.items():
                setattr(own, name, sizes[number])
            layer.mlp = Qwen3MoeSparseMoeBlock(own)
        self.post_init()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def text(model: Any) -> list[int]:
    ids = model.generate(
        input_ids=IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(map(int, ids[0]))


def saved(model: Any, directory: Path) -> tuple[Tensor, list[int]]:
    """Save a model whose experts matter; return its logits and its text."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(directory)
    return logits(model), text(model)


def test_layers_of_different_experts(tmp_path: Path) -> None:
    """From a config to text: planned, converted, loaded and run as transformers' code runs it.

    The class is one that is registered with transformers, which has none of its own.
    """
    AutoConfig.register("unequal_moe", UnequalConfig, exist_ok=True)
    AutoModelForCausalLM.register(UnequalConfig, UnequalForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    config = UnequalConfig(
        num_local_experts=COUNTS,
        moe_intermediate_size=WIDTHS,
        num_experts_per_tok=CHOSEN,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = UnequalForCausalLM._from_config(config, experts_implementation="eager")
    expected, written = saved(model, tmp_path / "src")
    spec = find_model(tmp_path / "src").spec
    assert [layer.experts.count for layer in spec.layers if layer.experts] == COUNTS
    assert [layer.experts.intermediate for layer in spec.layers if layer.experts] == WIDTHS
    assert [layer.experts.top_k for layer in spec.layers if layer.experts] == CHOSEN
    for experts in ("f32", "q4_0"):
        result = convert(tmp_path / "src", tmp_path / experts, experts=experts)
        assert result.experts == sum(COUNTS)
        assert result.expert_bytes == spec.store_bytes(experts)
    loaded, _ = load_fast_model(tmp_path / "f32", dtype="float32")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert text(loaded) == written
    quantized, _ = load_fast_model(tmp_path / "q4_0", dtype="float32")
    assert len(text(quantized)) == len(written)


def test_layers_that_choose_different_numbers_of_experts(tmp_path: Path) -> None:
    """The one family of transformers that has them runs as it does there."""
    kind, model_kind = FAMILIES["hunyuan_v1_moe"]
    torch.manual_seed(0)
    config = tiny_config(kind, moe_topk=[3, 1])
    model = model_kind._from_config(config, experts_implementation="eager")
    expected, written = saved(model, tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "f32", experts="f32")
    loaded, _ = load_fast_model(tmp_path / "f32", dtype="float32")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert text(loaded) == written
    spec = find_model(tmp_path / "f32").spec
    assert [layer.experts.top_k for layer in spec.layers if layer.experts] == [3, 1]


@pytest.mark.parametrize("told", ["listed", "by layer"])
def test_who_builds_layers_of_different_experts(told: str) -> None:
    """What is refused by name is what transformers does not build, family by family.

    A version that builds more of them fails here: it can run then, and is refused no more.
    """
    outcomes: Counter[bool] = Counter()
    for name, (kind, model_kind) in FAMILIES.items():
        settings = tiny_config(kind).to_dict() | {"model_type": name}
        for field, values in (("num_experts", [12, 8]), ("moe_topk", [2, 1])):
            own = kind.attribute_map.get(field, field)
            if own not in settings or name == "kimi_linear":  # whose lists nobody checks
                continue
            file = copy.deepcopy(settings)
            if told == "listed":
                file[own] = values
            else:
                for layer, value in enumerate(values):
                    layers = file.setdefault("per_layer_config", {})
                    layers.setdefault(str(layer), {})[own] = value
            if len(from_hf_config(as_read(file)).kinds_of_experts) < 2:
                continue
            try:
                check_layers_alike(Path("x"), file)
                refused = False
            except UnsupportedModelError:
                refused = True
            assert refused != _is_built(kind, model_kind, file), (name, field)
            outcomes[refused] += 1
    assert outcomes[True] >= 20
    assert outcomes[False] == int(told == "listed")


def _is_built(kind: Any, model_kind: Any, file: dict[str, Any]) -> bool:
    settings = {name: value for name, value in file.items() if name != "model_type"}
    try:
        with torch.device("meta"):
            model_kind._from_config(kind(**settings))
    except Exception:  # each family says it in its way
        return False
    return True


def test_layers_of_different_experts_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """Before anything is made of a checkpoint that transformers has no class for."""
    source = tmp_path / "src"
    source.mkdir()
    for file in tiny_model.iterdir():
        (source / file.name).symlink_to(file)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(settings | {"num_local_experts": [8, 4]}))
    with pytest.raises(UnsupportedModelError) as caught:
        convert(source, tmp_path / "to")
    assert "its layers have numbers of experts of 8, 4" in caught.value.message
    assert "builds all layers of qwen3_moe alike" in caught.value.message
    assert not (tmp_path / "to").exists()


def test_kinds_of_layers_by_number(tmp_path: Path) -> None:
    """MiniMax's own file lists its layers' kinds by number: converted and loaded as planned.

    Read by transformers alone, whose rule is another, it is refused.
    """
    kind, model_kind = FAMILIES["minimax"]
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = tiny_config(kind, layer_types=kinds, num_hidden_layers=3)
    model = model_kind._from_config(config, experts_implementation="eager")
    expected, written = saved(model, tmp_path / "src")
    edit_config(tmp_path / "src", layer_types=None, attn_type_list=[0, 1, 0])
    planned = [layer.mixer.kind for layer in find_model(tmp_path / "src").spec.layers]
    assert planned == ["linear", "full", "linear"]
    convert(tmp_path / "src", tmp_path / "f32", experts="f32")
    for directory in (tmp_path / "f32", tmp_path / "src"):
        loaded, _ = load_fast_model(directory, experts="f32", dtype="float32")
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        assert text(loaded) == written
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.float32)
    torch.testing.assert_close(logits(alone), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="attn_type_list, which transformers does not read"):
        model_kind.from_pretrained(tmp_path / "src", quantization_config=HybridConfig())
    edit_config(tmp_path / "src", attn_type_list=[0, 1])
    with pytest.raises(Exception, match="attn_type_list has 2 entries for 3 layers"):
        convert(tmp_path / "src", tmp_path / "to")
