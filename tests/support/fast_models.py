"""Tiny models of families that the fast path knows: written, loaded with and without it, asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid.fast.attach import DecodePath, attach_fast_path
from hybrid.packed.dense import PackedMlp, QuantizedEmbedding, QuantizedLinear
from hybrid.transformers_api import cache_argument
from hybrid.weights.checkpoint import convert
from hybrid.weights.config import HybridConfig
from massive import make_massive
from tiny_families import families, tiny_config

FAMILIES = [
    *("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "phimoe", "granitemoe", "gpt_oss"),
    *("glm4_moe", "ernie4_5_moe"),
]
#: Ranks of a compressed cache that every format takes.
RANKS = {"kv_lora_rank": 32, "q_lora_rank": 32}
#: Families with a compressed cache, at sizes that every format takes; queries with and without
#: compression, groups of experts chosen by one or two of each.
COMPRESSED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_group": 4, "topk_group": 2},
    "deepseek_v3 with plain queries": {"q_lora_rank": None, "rope_interleave": False},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2 with plain queries": {"q_lora_rank": None, "first_k_dense_replace": 1},
    "glm4_moe_lite": {},
}
#: Families with layers that keep a state, beside those with keys and values.
STATEFUL: dict[str, dict[str, Any]] = {
    family: {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    }
    for family in ("qwen3_next", "qwen3_5_moe_text")
}
STORES = {"f32": ("f32", None), "q8_0": ("q8_0", "q8_0")}
NEW_TOKENS = 20
PROMPT = torch.tensor([[5, 9, 33, 21, 7, 80, 2]])
_PACKED = (QuantizedLinear, QuantizedEmbedding, PackedMlp)
#: Two sequences of the same length.
BATCH = torch.cat((PROMPT, PROMPT.flip(1)))


def changes_of(family: str) -> dict[str, Any]:
    """Return what a family's tiny config needs for the kernels."""
    return RANKS | COMPRESSED[family] if family in COMPRESSED else STATEFUL.get(family, {})


def save_family(family: str, directory: Path, massive: bool = False, **changes: Any) -> None:
    """A tiny model with weights large enough that every part of it shows in the logits."""
    config, kind = families()[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(tiny_config(config, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2.4 / parameter.shape[-1] ** 0.5)
            else:
                parameter.data += torch.randn_like(parameter) * 0.2
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.copy_(torch.rand_like(buffer) * 0.1)
    if massive:
        make_massive(model)
    model.save_pretrained(directory)


def load_family(
    family: str,
    folder: Path,
    store: str = "f32",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """Write, convert and load a family's model, without the fast path."""
    experts, dense = STORES[store]
    save_family(family, folder / "source", **changes)
    convert(folder / "source", folder / "model", experts=experts, dense=dense)
    return open_model(folder / "model", dtype, fast=False)


@torch.no_grad()
def feed(forward: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """Logits ``[T, V]`` of some more tokens of one text."""
    logits: Tensor = forward(
        input_ids=ids, **cache_argument(cache), use_cache=True, **options
    ).logits
    return logits[0]


def install_fast_decode(model: Any) -> DecodePath:
    """Give a model that was loaded without it the fast path; ``model.slow`` goes past it.

    Packed modules replace the model's own, as in HybridModel.
    """
    model.slow = model.forward
    attach_fast_path(model, replace=True)
    model.hybrid_fast.settle(model)
    return model.hybrid_fast.path


def write_greedily(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the logits that they were chosen by."""
    out = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    return out.sequences, torch.cat(out.logits)


def converted(family: str, folder: Path) -> Path:
    """Write and convert a family's model."""
    save_family(family, folder / "source")
    convert(folder / "source", folder / "model", experts="f32")
    return folder / "model"


def open_model(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load a directory as transformers does; ``options`` are HybridConfig's."""
    asked = {"quantization_config": HybridConfig(**options)} if options else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **asked)
    model.generation_config.eos_token_id = None  # every run as long as it is asked to be
    return model


def write(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    """Greedy tokens, unless ``options`` say otherwise."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    settings.setdefault("attention_mask", torch.ones_like(ids))
    found: torch.Tensor = model.generate(ids, **settings)
    return found


def written(model: Any, ids: list[list[int]]) -> list[list[int]]:
    """The same for other processes, whom tensors reach less easily."""
    found: list[list[int]] = write(model, torch.tensor(ids)).tolist()
    return found


class CountedTokens:
    """Counts single tokens that go through the fast path of a model, and the tokens of its steps.

    Attributes
    ----------
    count
        Single tokens.
    steps
        Of every step of several tokens how many texts it had, and how many tokens of each.
    """

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.steps: list[tuple[int, ...]] = []
        decoder = model.hybrid_fast.decoder
        real, real_step = decoder.forward, decoder.step

        def forward(arguments: Any) -> Any:
            self.count += 1
            return real(arguments)

        def step(arguments: Any, *others: Any) -> Any:
            self.steps.append(tuple(arguments["input_ids"].shape))
            return real_step(arguments, *others)

        monkeypatch.setattr(decoder, "forward", forward)
        monkeypatch.setattr(decoder, "step", step)


def owned(directory: Path) -> Any:
    """A model whose modules are replaced while the path is in use, as in HybridModel."""
    model = open_model(directory)
    model.hybrid_fast.replace = True
    return model


def opened(directory: Path, replace: bool) -> Any:
    """A model whose modules are replaced, or are not."""
    return owned(directory) if replace else open_model(directory)


def packed_modules(model: Any) -> list[str]:
    """The names of modules that are ours."""
    return [name for name, module in model.named_modules() if isinstance(module, _PACKED)]
