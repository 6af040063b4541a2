"""The architectures of GGUF files that are read: which of transformers' models each one is.

An architecture is an entry of :data:`ARCHITECTURES`: transformers' ``model_type``, the settings
that only it has, and what its writer (llama.cpp's ``convert_hf_to_gguf.py``) does to weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hybrid.gguf.header import GgufHeader

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture as transformers has it.

    Parameters
    ----------
    model_type
        transformers' name of it.
    settings
        What else its ``config.json`` has, of a header; over what all have.
    permuted
        Whether rows of queries and keys are stored pair by pair.
    shifted_norms
        Whether weights of norms are stored with the 1 that transformers adds to them, but for
        those whose names in transformers end so.
    """

    model_type: str
    settings: Callable[[GgufHeader], Settings] = field(default=lambda header: {})
    permuted: bool = False
    shifted_norms: bool = False
    unshifted: tuple[str, ...] = ()


def _experts(count: str, header: GgufHeader, **more: str) -> Settings:
    """Settings that say how many experts there are, by the names that a family has for them."""
    found = {
        count: int(header.get("expert_count")),
        "num_experts_per_tok": int(header.get("expert_used_count")),
    }
    for name, key in more.items():
        if header.get(key) is not None:
            found[name] = header.get(key)
    return found


def _width(header: GgufHeader, kind: str, layer: int | None = None) -> int | None:
    """Return the intermediate width of a kind of MLP, as its tensors have it."""
    layers = range(int(header.get("block_count"))) if layer is None else (layer,)
    for number in layers:
        tensor = header.tensors.get(f"blk.{number}.ffn_up{kind}.weight")
        if tensor is not None:
            return tensor.shape[-2]
    return None


def _has(header: GgufHeader, part: str) -> bool:
    """Whether any layer has a tensor."""
    return any(name.endswith(f".{part}") for name in header.tensors)


def _dense_layers(header: GgufHeader) -> list[int]:
    """Return the layers that have an MLP in place of experts."""
    return [
        number
        for number in range(int(header.get("block_count")))
        if f"blk.{number}.ffn_gate_inp.weight" not in header.tensors
    ]


def _biased(header: GgufHeader) -> Settings:
    return {"attention_bias": _has(header, "attn_q.bias")}


def _mixtral(header: GgufHeader) -> Settings:
    return _experts("num_local_experts", header)


def _qwen2_moe(header: GgufHeader) -> Settings:
    return {
        **_experts("num_experts", header),
        "moe_intermediate_size": _width(header, "_exps"),
        "shared_expert_intermediate_size": _width(header, "_shexp"),
        "mlp_only_layers": _dense_layers(header),
        "norm_topk_prob": False,
        "qkv_bias": _has(header, "attn_q.bias"),
    }


def _qwen3_moe(header: GgufHeader) -> Settings:
    return {
        **_experts("num_experts", header),
        **_biased(header),
        "moe_intermediate_size": _width(header, "_exps"),
        "mlp_only_layers": _dense_layers(header),
        "norm_topk_prob": True,
    }


def _olmoe(header: GgufHeader) -> Settings:
    return {
        **_experts("num_experts", header),
        "intermediate_size": _width(header, "_exps"),
        "norm_topk_prob": False,
        "clip_qkv": header.get("attention.clamp_kqv"),
    }


def _granite(header: GgufHeader) -> Settings:
    names = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    found = {name: header.get(key) for name, key in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _granite_moe(header: GgufHeader) -> Settings:
    shared = _width(header, "_shexp")
    return {
        **_granite(header),
        **_experts("num_local_experts", header),
        "intermediate_size": _width(header, "_exps"),
        **({} if shared is None else {"shared_intermediate_size": shared}),
    }


def _gpt_oss(header: GgufHeader) -> Settings:
    layers = int(header.get("block_count"))
    kinds = ("sliding_attention", "full_attention")
    return {
        **_experts("num_local_experts", header),
        "intermediate_size": _width(header, "_exps"),
        "sliding_window": header.get("attention.sliding_window"),
        "layer_types": [kinds[number % 2] for number in range(layers)],
    }


def _deepseek(header: GgufHeader) -> Settings:
    """V2, V3 and models of their form; keys of files that have compressed attention split."""
    rope = int(header.get("rope.dimension_count"))
    key = int(header.get("attention.key_length_mla") or header.get("attention.key_length"))
    value = header.get("attention.value_length_mla") or header.get("attention.value_length")
    heads = int(header.get("attention.head_count"))
    experts = _experts(
        "n_routed_experts",
        header,
        n_shared_experts="expert_shared_count",
        n_group="expert_group_count",
        topk_group="expert_group_used_count",
        routed_scaling_factor="expert_weights_scale",
    )
    rank = header.get("attention.q_lora_rank") if _has(header, "attn_q_a.weight") else None
    return {
        **experts,
        "num_key_value_heads": heads,
        "moe_intermediate_size": _width(header, "_exps"),
        "first_k_dense_replace": int(header.get("leading_dense_block_count", 0)),
        "norm_topk_prob": bool(header.get("expert_weights_norm", False)),
        "kv_lora_rank": int(header.get("attention.kv_lora_rank")),
        "q_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": int(value),
        "head_dim": rope,
    }


def _deepseek_v2(header: GgufHeader) -> Settings:
    groups = int(header.get("expert_group_count") or 1)
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {**_deepseek(header), "topk_method": method}


def _glm4_moe(header: GgufHeader) -> Settings:
    return {
        **_experts(
            "n_routed_experts",
            header,
            n_shared_experts="expert_shared_count",
            n_group="expert_group_count",
            topk_group="expert_group_used_count",
            routed_scaling_factor="expert_weights_scale",
        ),
        **_biased(header),
        "moe_intermediate_size": _width(header, "_exps"),
        "first_k_dense_replace": int(header.get("leading_dense_block_count", 0)),
        "norm_topk_prob": bool(header.get("expert_weights_norm", True)),
        "use_qk_norm": _has(header, "attn_q_norm.weight"),
    }


def _ernie(header: GgufHeader) -> Settings:
    return {
        "moe_num_experts": int(header.get("expert_count")),
        "moe_k": int(header.get("expert_used_count")),
        "moe_num_shared_experts": int(header.get("expert_shared_count") or 0),
        "moe_layer_start_index": int(header.get("leading_dense_block_count", 0)),
        "moe_layer_interval": int(header.get("interleave_moe_layer_step", 1)),
        "moe_intermediate_size": _width(header, "_exps"),
        "use_bias": _has(header, "attn_q.bias"),
    }


def _qwen3_next(header: GgufHeader) -> Settings:
    heads = int(header.get("ssm.time_step_rank"))
    layers = int(header.get("block_count")) - int(header.get("nextn_predict_layers", 0))
    linear = [f"blk.{number}.ssm_a" in header.tensors for number in range(layers)]
    return {
        **_experts("num_experts", header),
        "moe_intermediate_size": _width(header, "_exps"),
        "shared_expert_intermediate_size": _width(header, "_shexp"),
        "norm_topk_prob": True,
        "linear_conv_kernel_dim": int(header.get("ssm.conv_kernel")),
        "linear_key_head_dim": int(header.get("ssm.state_size")),
        "linear_num_key_heads": int(header.get("ssm.group_count")),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": int(header.get("ssm.inner_size")) // heads,
        "layer_types": ["linear_attention" if one else "full_attention" for one in linear],
    }


def _gemma3(header: GgufHeader) -> Settings:
    layers, head_dim = int(header.get("block_count")), int(header.get("attention.key_length"))
    pattern = header.get("attention.sliding_window_pattern")
    every = 6 if not isinstance(pattern, int) else pattern
    slides = pattern if isinstance(pattern, list) else [(n + 1) % every for n in range(layers)]
    widest = layers == 62  # only the largest divides by something else than its heads' width
    heads = int(header.get("attention.head_count"))
    return {
        "query_pre_attn_scalar": (
            int(header.get("embedding_length")) // heads if widest else head_dim
        ),
        "sliding_window": header.get("attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "final_logit_softcapping": header.get("final_logit_softcapping"),
    }


def _smollm3(header: GgufHeader) -> Settings:
    layers = int(header.get("block_count"))
    return {
        **_biased(header),
        "no_rope_layers": [int((number + 1) % 4 != 0) for number in range(layers)],
        "use_sliding_window": False,
    }


#: Architectures by the names that files have for them; ``/moe`` is one of them with experts.
ARCHITECTURES = {
    "llama": Architecture(model_type="llama", settings=_biased, permuted=True),
    "llama/moe": Architecture(model_type="mixtral", settings=_mixtral, permuted=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen2moe": Architecture(model_type="qwen2_moe", settings=_qwen2_moe),
    "qwen3": Architecture(model_type="qwen3", settings=_biased),
    "qwen3moe": Architecture(model_type="qwen3_moe", settings=_qwen3_moe),
    "qwen3next": Architecture(
        model_type="qwen3_next",
        settings=_qwen3_next,
        shifted_norms=True,
        unshifted=("linear_attn.norm.weight",),
    ),
    "olmoe": Architecture(model_type="olmoe", settings=_olmoe),
    "granite": Architecture(model_type="granite", settings=_granite, permuted=True),
    "granitemoe": Architecture(model_type="granitemoe", settings=_granite_moe, permuted=True),
    "granitemoe/shared": Architecture(
        model_type="granitemoeshared", settings=_granite_moe, permuted=True
    ),
    "gpt-oss": Architecture(model_type="gpt_oss", settings=_gpt_oss),
    "deepseek2": Architecture(model_type="deepseek_v2", settings=_deepseek_v2),
    "deepseek2/sigmoid": Architecture(model_type="deepseek_v3", settings=_deepseek),
    "glm4moe": Architecture(model_type="glm4_moe", settings=_glm4_moe),
    "ernie4_5-moe": Architecture(model_type="ernie4_5_moe", settings=_ernie),
    "gemma3": Architecture(model_type="gemma3_text", settings=_gemma3, shifted_norms=True),
    "smollm3": Architecture(model_type="smollm3", settings=_smollm3, permuted=True),
}

#: The number by which files say that experts are scored by a sigmoid.
_SIGMOID = 2


def architecture_of(header: GgufHeader) -> Architecture | None:
    """Return what a file's architecture is; None where it is none that is read."""
    name = header.architecture
    if name == "llama" and int(header.get("expert_count") or 0) > 1:
        name = "llama/moe"
    elif name == "granitemoe" and _has(header, "ffn_up_shexp.weight"):
        name = "granitemoe/shared"
    elif name == "deepseek2" and (
        header.get("expert_gating_func") == _SIGMOID or _has(header, "exp_probs_b.bias")
    ):
        name = "deepseek2/sigmoid"
    return ARCHITECTURES.get(name)


def known_names() -> list[str]:
    """Return the names of the architectures that are read."""
    return sorted({name.partition("/")[0] for name in ARCHITECTURES})
