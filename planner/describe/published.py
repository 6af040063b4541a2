"""Translates what config.json files say in their publishers' words into the planner's.

transformers' config classes do the same when they read such a file; what they compute from other
fields is done here. Names that only stand for another are
:mod:`hybrid.ask.config_classes`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = dict[str, Any]

_COMPRESSED = {4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_COMPRESS_RATES = {kind: rate for rate, kind in _COMPRESSED.items()}
_DOTS3_NEAR = {
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 64,
    "swa_q_lora_rank": 1024,
    "swa_kv_lora_rank": 1024,
    "swa_head_dim": 256,
    "swa_qk_nope_head_dim": 192,
    "swa_v_head_dim": 128,
}
"""What dots3_note's layers with a window are where its file does not say."""
_SAME_FAMILY = {"minimax_text_01": "minimax", "minimax_m1": "minimax"}
"""What a publisher's own code calls a family of transformers."""


def translated(text: Mapping[str, Any]) -> Table:
    """Return a language model's table with the fields that the planner reads."""
    table = dict(text)
    family = str(table.get("model_type") or "")
    family = table["model_type"] = _SAME_FAMILY.get(family, family)
    for name, value in list(table.items()):
        if value == "auto":  # which is what it is where it is absent
            del table[name]
    translate = _TRANSLATIONS.get(family)
    return table if translate is None else translate(table)


def _dbrx(table: Table) -> Table:
    """DBRX keeps its expert and attention fields in tables of their own."""
    attention, ffn = table.get("attn_config") or {}, table.get("ffn_config") or {}
    return table | {
        "moe_num_experts": ffn.get("moe_num_experts"),
        "moe_top_k": ffn.get("moe_top_k"),
        "intermediate_size": ffn.get("ffn_hidden_size"),
        "num_attention_heads": table.get("n_heads", table.get("num_attention_heads")),
        "num_key_value_heads": attention.get("kv_n_heads"),
    }


def _linear_attention(table: Table) -> Table:
    """Kimi keeps what its linear layers are, and which they are (counted from 1), in a table."""
    linear = table.get("linear_attn_config")
    if not isinstance(linear, Mapping):
        return table
    for name, own in (
        ("head_dim", "linear_head_dim"),
        ("num_heads", "linear_num_heads"),
        ("short_conv_kernel_size", "linear_conv_kernel_dim"),
    ):
        if linear.get(name) is not None:
            table[own] = linear[name]
    full, rest = linear.get("full_attn_layers"), linear.get("kda_layers")
    if table.get("layer_types") is None and isinstance(full, list) and isinstance(rest, list):
        kinds = dict.fromkeys(full, "full_attention") | dict.fromkeys(rest, "linear_attention")
        table["layer_types"] = [kinds[layer] for layer in sorted(kinds)]
    return table


def _bailing_hybrid(table: Table) -> Table:
    """Its linear layers have the heads of the others, and take their own fields' place."""
    for own, name in (
        ("linear_head_dim", "head_dim"),
        ("linear_num_heads", "num_attention_heads"),
        ("linear_conv_kernel_dim", "short_conv_kernel_size"),
    ):
        if table.get(own) is None:
            table[own] = table.get(name)
    return table


def _deepseek_v4(table: Table) -> Table:
    rates = dict(table.get("compress_rates") or _COMPRESS_RATES)
    for name, kind in (
        ("compress_rate_csa", "compressed_sparse_attention"),
        ("compress_rate_hca", "heavily_compressed_attention"),
    ):
        if table.get(name) is not None:
            rates[kind] = table[name]
    ratios = table.get("compress_ratios")
    if table.get("layer_types") is None and isinstance(ratios, list):
        table["layer_types"] = [_COMPRESSED.get(ratio, "sliding_attention") for ratio in ratios]
    return table | {"compress_rates": rates}


def _dots3_note(table: Table) -> Table:
    width = table.get("moe_shared_expert_intermediate_size")
    if width is not None:
        table["shared_experts_intermediate_size"] = width
    if table.get("sliding_window") is None:
        table["sliding_window"] = table.get("sliding_window_size", 512)
    if "per_layer_config" in table:
        return table
    table = _DOTS3_NEAR | table
    if "swa_qk_rope_head_dim" not in table:
        table["swa_qk_rope_head_dim"] = table["swa_head_dim"] - table["swa_qk_nope_head_dim"]
    return table


def _gemma4(table: Table) -> Table:
    """Layers that see all have wider heads."""
    if "per_layer_config" in table:
        return table
    if not table.get("attention_k_eq_v", True):
        table["num_global_key_value_heads"] = None
    return {"global_head_dim": 512} | table


def _inkling(table: Table) -> Table:
    """Where the dense layers have a width of their own, the other one is the experts'."""
    if table.get("dense_intermediate_size") is not None:
        table["moe_intermediate_size"] = table.get("intermediate_size")
        table["intermediate_size"] = table.pop("dense_intermediate_size")
    return table


def _laguna(table: Table) -> Table:
    if table.get("num_attention_heads_per_layer") is not None:
        table["num_attention_heads"] = table.pop("num_attention_heads_per_layer")
    return table


def _lfm2(table: Table) -> Table:
    if table.get("tie_embedding") is not None:
        table["tie_word_embeddings"] = table["tie_embedding"]
    return table


def _mimo(table: Table) -> Table:
    """Its own window does not count the token itself, transformers' does."""
    if isinstance(table.get("sliding_window_size"), int):
        table["sliding_window"] = table.pop("sliding_window_size") + 1
    return table


def _minimax_m3(table: Table) -> Table:
    sparse = table.get("sparse_attention_config")
    if not isinstance(sparse, Mapping):
        return table
    for name, own in (
        ("sparse_num_index_heads", "index_n_heads"),
        ("sparse_index_dim", "index_head_dim"),
    ):
        if sparse.get(name) is not None:
            table[own] = sparse[name]
    often = sparse.get("sparse_attention_freq")
    if table.get("layer_types") is None and isinstance(often, list):
        table["layer_types"] = ["minimax_m3_sparse" if one else "full_attention" for one in often]
    return table


def _mistral_large4(table: Table) -> Table:
    """Every layer has keys and values of its own unless the file says whose it takes."""
    if table.get("kv_source_layers") == list(range(len(table.get("kv_source_layers") or ()))):
        table.pop("kv_source_layers", None)
    return table


def _nemotron_h(table: Table) -> Table:
    for name, own in (("mamba_n_groups", "n_groups"), ("mamba_d_conv", "conv_kernel")):
        if table.get(name) is not None:
            table[own] = table[name]
    return table


def _step3p7(table: Table) -> Table:
    other = table.get("attention_other_setting")
    if table.get("num_sliding_attention_heads") is None and isinstance(other, Mapping):
        table["num_sliding_attention_heads"] = other.get("num_attention_heads")
    return table


def _text_modality(table: Table) -> Table:
    """Ernie's experts for images, listed second, have a width of their own."""
    for name in ("moe_intermediate_size", "moe_num_experts", "moe_layer_start_index"):
        if isinstance(table.get(name), list) and len(table[name]) == 2:
            table[name] = table[name][0]
    if table.get("moe_intermediate_size") is None:
        table["moe_intermediate_size"] = 1536
    return table


_TRANSLATIONS: dict[str, Callable[[Table], Table]] = {
    "bailing_hybrid": _bailing_hybrid,
    "dbrx": _dbrx,
    "deepseek_v4": _deepseek_v4,
    "dots3_note_text": _dots3_note,
    "ernie4_5_vl_moe": _text_modality,
    "ernie4_5_vl_moe_text": _text_modality,
    "diffusion_gemma_text": _gemma4,
    "gemma4_text": _gemma4,
    "glm5_next_text": _linear_attention,
    "inkling_text": _inkling,
    "kimi_linear": _linear_attention,
    "laguna": _laguna,
    "lfm2_moe": _lfm2,
    "mimo_v2_flash": _mimo,
    "minimax_m3_vl_text": _minimax_m3,
    "mistral_large4_text": _mistral_large4,
    "nemotron_h": _nemotron_h,
    "step3p7_text": _step3p7,
    "step3p5": _step3p7,
}
