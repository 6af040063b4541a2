"""Writes random weights of a Qwen3-MoE shape to a GGUF file, which llama.cpp can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UsageError

_BLOCK = 18  # bytes of a q4_0 block of 32: an fp16 scale and 16 bytes of codes


def require_qwen3(settings: dict[str, Any]) -> None:
    """Raise UsageError for a model of another family."""
    if settings.get("model_type") != "qwen3_moe":
        raise UsageError(
            f"the comparison is written for qwen3_moe, the model is {settings.get('model_type')}",
            hint="use --spec qwen3-30b-a3b",
        )


def write_gguf(settings: dict[str, Any], path: Path) -> None:
    """Write a model with every matrix in q4_0; norms and routers in float32, as llama.cpp does.

    Parameters
    ----------
    settings
        Values of a Qwen3-MoE ``config.json``.

    Raises
    ------
    UsageError
        For a model of another family.
    """
    require_qwen3(settings)
    layers, hidden = settings["num_hidden_layers"], settings["hidden_size"]
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    width, experts = settings["head_dim"], settings["num_experts"]
    inner = settings["moe_intermediate_size"]
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(settings.get("intermediate_size") or inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(float(settings.get("rope_theta", 1e6)))
    writer.add_layer_norm_rms_eps(settings.get("rms_norm_eps", 1e-6))
    writer.add_expert_count(experts)
    writer.add_expert_used_count(settings["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    cache: dict[tuple[int, ...], NDArray[np.uint8]] = {}

    def q4_0(name: str, *shape: int) -> None:
        # Layers may share their numbers: the file holds each of them all the same.
        if shape not in cache:
            blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, _BLOCK), np.uint8)
            blocks[..., :2] = np.array([0.003], np.float16).view(np.uint8)
            cache[shape] = blocks.reshape(*shape[:-1], -1)
        writer.add_tensor(name, cache[shape], raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def f32(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.02
        writer.add_tensor(name, values.astype(np.float32))

    q4_0("token_embd.weight", settings["vocab_size"], hidden)
    q4_0("output.weight", settings["vocab_size"], hidden)
    f32("output_norm.weight", hidden)
    for i in range(layers):
        f32(f"blk.{i}.attn_norm.weight", hidden)
        f32(f"blk.{i}.ffn_norm.weight", hidden)
        f32(f"blk.{i}.attn_q_norm.weight", width)
        f32(f"blk.{i}.attn_k_norm.weight", width)
        q4_0(f"blk.{i}.attn_q.weight", heads * width, hidden)
        q4_0(f"blk.{i}.attn_k.weight", kv_heads * width, hidden)
        q4_0(f"blk.{i}.attn_v.weight", kv_heads * width, hidden)
        q4_0(f"blk.{i}.attn_output.weight", hidden, heads * width)
        f32(f"blk.{i}.ffn_gate_inp.weight", experts, hidden)
        q4_0(f"blk.{i}.ffn_gate_exps.weight", experts, inner, hidden)
        q4_0(f"blk.{i}.ffn_up_exps.weight", experts, inner, hidden)
        q4_0(f"blk.{i}.ffn_down_exps.weight", experts, hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
