"""Tiny random models of every text family with experts that transformers installs.

Families are found by introspection; their configs are shrunk by rules over the names of the
numbers in them, with a short table for what no rule covers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

import hybrid.transformers_api  # noqa: F401  # a version whose Llama 4 fails needs it

VOCAB = 96
LAYERS = 2
EXPERTS = 8

#: The first pattern that matches the whole name of a number decides; other numbers stay.
_RULES: list[tuple[str, Any]] = [
    (r"vocab_size|.*_vocab_size(_base)?", VOCAB),
    (r"pad_token_id|bos_token_id|.*_token_id|.*_token_index", 0),
    (r"eos_token_id", None),
    (r"num_hidden_layers|n_layers|num_layers", LAYERS),
    (r"num_nextn_predict_layers|num_dense_layers|first_k_dense_replace|.*dense_layers", 0),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|num_routed_experts", EXPERTS),
    (r"(moe_)?num_shared_experts|n_shared_experts", 1),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|experts_per_token", 2),
    (r"n_group|num_expert_group|topk_group|n_groups", 1),
    (r"num_attention_heads|n_heads|.*num_heads|index_n_heads|linear_num_.*_heads", 4),
    (r"num_key_value_heads|kv_n_heads|.*num_key_value_heads", 2),
    (r".*rope_head_dim", 8),
    (r".*head_dim", 16),
    (r".*lora_rank|.*lowrank", 16),
    (r"max_position_embeddings|max_seq_len|model_max_length|.*sliding_window.*|.*topk", 128),
    (r"(moe|expert_ffn)_(intermediate|hidden)_size", 36),
    (r".*intermediate_size|ffn_hidden_size|.*ffn.*size", 48),
    (r"hidden_size|d_model|.*hidden_size|.*hidden_dim|.*embed_dim|.*_dim", 64),
    (r".*chunk_size", 16),
]

_HYBRID = ["linear_attention", "full_attention"]

#: What a family needs beyond the rules, by model type.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": EXPERTS},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
    },
    "flint": {"mlp_only_layers": []},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 32, "layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 4},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe"], "ssm_state_size": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """List all causal language models whose code declares experts, by model type.

    A config that only wraps a text config is left out: its text config is in the list.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return {
        config.model_type: (config, model)
        for mapping in mappings
        for config, model in mapping.items()
        if model.__name__.endswith("ForCausalLM")
        and "text_config" not in config.sub_configs
        and _declares_experts(model)
    }


def causal_families() -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Those that ``AutoModelForCausalLM`` loads and whose experts we run.

    Attention of jetmoe is routed through experts, too, which is refused.
    """
    return {
        kind: types
        for kind, types in families().items()
        if kind != "jetmoe" and types[0] in MODEL_FOR_CAUSAL_LM_MAPPING
    }


def multimodal(*names: str) -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Look up families that are used with text but only exist with towers for more."""
    by_name = {c.model_type: (c, m) for c, m in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items()}
    return {name: by_name[name] for name in names}


def _declares_experts(model: Any) -> bool:
    code = Path(str(sys.modules[model.__module__].__file__)).read_text()
    return re.search(r"class \w*Experts\(nn\.Module\)", code) is not None


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a config of ``kind`` with two small layers, at least one with experts.

    ``changes`` win over everything.
    """
    small = _shrink(kind().to_dict()) | _EXCEPTIONS.get(kind.model_type, {})
    return kind(**small | changes)


def _shrink(settings: dict[str, Any]) -> dict[str, Any]:
    small = {}
    for name, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            small[name] = _last_kinds(value) if name != "architectures" else value
        elif name == "per_layer_config":
            continue
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            small[name] = _shrink(value)
        elif (isinstance(value, int) and not isinstance(value, bool)) or value is None:
            rule = next((n for rule, n in _RULES if re.fullmatch(rule, name)), value)
            small[name] = rule
        else:
            small[name] = value
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
        small.pop("qk_head_dim", None)
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _last_kinds(kinds: list[str]) -> list[str]:
    """Two layers of different kinds if there are several; sparse rather than dense."""
    kept = [kind for kind in dict.fromkeys(kinds) if kind != "dense"]
    return (kept * LAYERS)[-LAYERS:]
