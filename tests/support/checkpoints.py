"""Checkpoints that tests need: made of raw tensors, without transformers' help."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid.formats.errors import HybridError
from hybrid.weights.checks import Checkpoint, check_files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refused(src: Path) -> HybridError:
    """Return the one error that the checks of files end with; it has a hint."""
    with pytest.raises(HybridError) as caught:
        check_files(Checkpoint(src))
    assert caught.value.hint
    return caught.value


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def write_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_fp8_blocks(
    weights: dict[str, torch.Tensor], block: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Quantize all projections to fp8; return that checkpoint and the weights it stands for."""
    stored, meant = {}, {}
    for key, weight in weights.items():
        if not key.endswith("_proj.weight"):
            stored[key] = meant[key] = weight
            continue
        rows, cols = weight.shape
        grid = (-(-rows // block), -(-cols // block))
        padded = torch.zeros(grid[0] * block, grid[1] * block)
        padded[:rows, :cols] = weight
        blocks = padded.view(grid[0], block, grid[1], block)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        wide = (codes.float() * scales[:, None, :, None]).view(padded.shape)
        stored[key] = codes.view(padded.shape)[:rows, :cols].contiguous()
        stored[f"{key}_scale_inv"] = scales
        meant[key] = wide[:rows, :cols].contiguous()
    return stored, meant


def write_big_mixtral(directory: Path, *, experts: int, hidden: int, intermediate: int) -> int:
    """Write a one-layer bfloat16 Mixtral of repeating noise; return its size in bytes.

    Written straight to disk, so that making it takes no memory and little time.
    """
    directory.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for key, shape in _mixtral_tensors(experts, hidden, intermediate):
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal(1 << 19).astype(np.float32) * 0.02
    noise = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (directory / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for left in range(end, 0, -len(noise)):
            file.write(noise[:left])
    return end


def _mixtral_tensors(
    experts: int, hidden: int, intermediate: int
) -> Iterator[tuple[str, list[int]]]:
    yield "model.embed_tokens.weight", [256, hidden]
    yield "lm_head.weight", [256, hidden]
    yield "model.norm.weight", [hidden]
    layer = "model.layers.0"
    for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
        yield f"{layer}.self_attn.{name}_proj.weight", [rows, hidden]
    yield f"{layer}.input_layernorm.weight", [hidden]
    yield f"{layer}.post_attention_layernorm.weight", [hidden]
    yield f"{layer}.block_sparse_moe.gate.weight", [experts, hidden]
    for expert in range(experts):
        path = f"{layer}.block_sparse_moe.experts.{expert}"
        yield f"{path}.w1.weight", [intermediate, hidden]
        yield f"{path}.w2.weight", [hidden, intermediate]
        yield f"{path}.w3.weight", [intermediate, hidden]
