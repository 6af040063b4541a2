"""Every MoE family of the installed transformers: its config parses, its counts are the model's."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_configs import expert_counts, make_config, moe_families
from planner.describe.families import from_hf_config
from planner.errors import SpecError

# transformers is imported inside the tests: collecting them stays quick.

# Counted differently on purpose: transformers allots weights to LongCat's zero-computation
# experts that its checkpoints do not have; Muse Spark's experts share a norm.
APART = {"longcat_flash", "muse_spark", "muse_spark_text"}


def model_counts(family: str, config: Any) -> tuple[int, int]:
    """Expert parameters and all parameters of the language model, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not re.search(r"vision|visual|audio", name)
    }
    pattern = r"mlp\.\w+put_linear" if family == "jetmoe" else r"\.experts\."
    return sum(s for n, s in sizes.items() if re.search(pattern, n)), sum(sizes.values())


def test_counts_are_the_models() -> None:
    """Experts exactly, everything within 1%, against the models transformers builds."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    wrong, compared = {}, set()
    for family, config in moe_families(NAMES).items():
        spec = from_hf_config(config.to_dict(), family)
        if family in APART:
            continue
        try:
            experts, total = model_counts(family, config)
        except (TypeError, AttributeError):
            continue  # transformers cannot build a model from its own default config
        compared.add(family)
        if spec.expert_params != experts or abs(spec.total_params / total - 1) > 0.01:
            wrong[family] = (spec.expert_params, experts, spec.total_params, total)
    assert not wrong
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"} <= compared
    assert len(compared) >= 45


def test_multimodal_configs_use_their_language_model() -> None:
    """The text part's experts are found inside a composite config."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    found = moe_families(NAMES)
    for family, config in found.items():
        spec = from_hf_config(config.to_dict(), family)
        assert spec.experts.count in expert_counts(config), family
        assert spec.hidden == config.get_text_config().hidden_size, family
    assert {"qwen3_vl_moe", "glm4v_moe", "llama4"} <= set(found)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "bamba", "granite"])
def test_dense_families_have_no_experts(family: str) -> None:
    """A dense model is told apart, and all its weights are counted as every token's."""
    spec = from_hf_config(make_config(family).to_dict(), family)
    assert (spec.moe_layers, spec.experts.count, spec.expert_params) == (0, 0, 0)
    assert spec.ffn_params > 0


def test_experts_that_are_no_matrices_are_refused() -> None:
    """Doge's experts are rows of an embedding: there is nothing to place."""
    config = {**make_config("doge").to_dict(), "is_moe": True}
    with pytest.raises(SpecError, match="rows of an embedding"):
        from_hf_config(config)
