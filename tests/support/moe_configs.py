"""Default configs of every MoE family of the installed transformers."""

from __future__ import annotations

import re
from typing import Any

# transformers is imported inside the functions: collecting tests stays quick.

EXPERT_COUNT = re.compile(r"^(moe_)?n(um)?_(local_|routed_)?experts$")
# Fields the default config leaves empty although a model of the family needs them.
REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 32,
        "top_k_experts": 4,
        "moe_intermediate_size": 512,
    },
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
# The default config has no usable sizes, or the family's experts are rows of an embedding.
UNUSABLE = {"deepseek_ocr2", "doge", "gemma4", "gemma4_assistant", "diffusion_gemma"}


def make_config(family: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**REQUIRED.get(family, {}))


def expert_counts(config: Any) -> set[int]:
    """What the language model's config says of experts, whatever it calls them."""
    text = config.get_text_config().to_dict()
    counts = {text[key] for key in text if EXPERT_COUNT.match(key)}
    return {count for count in counts if isinstance(count, int) and count > 1}


def moe_families(names: Any) -> dict[str, Any]:
    """The families among ``names`` whose default config has experts, with that config."""
    found = {}
    for family in sorted(set(names) - UNUSABLE):
        try:
            config = make_config(family)
            if expert_counts(config):
                found[family] = config
        except (ValueError, TypeError, AttributeError):
            continue  # a composite that cannot be made without being told its parts
    return found
