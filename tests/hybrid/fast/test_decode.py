"""The fast path of a loaded model beside transformers' code on the same weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fast_models import (
    COMPRESSED,
    FAMILIES,
    NEW_TOKENS,
    PROMPT,
    STATEFUL,
    STORES,
    CountedTokens,
    changes_of,
    install_fast_decode,
    load_family,
    open_model,
    write_greedily,
)
from hybrid.packed.dense import QuantizedEmbedding
from hybrid.transformers_api import cache_argument
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")


@pytest.mark.parametrize(
    ("family", "store"), [*product(FAMILIES, STORES), *product([*COMPRESSED, *STATEFUL], ["f32"])]
)
def test_a_family_decodes_as_transformers_does(
    family: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and 20 tokens: the same tokens, the same logits, on the fast path."""
    changes: dict[str, Any] = changes_of(family)
    model = load_family(family.split()[0], tmp_path, store, **changes)
    tokens, logits = write_greedily(model)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    counted = CountedTokens(model, monkeypatch)
    fast_tokens, fast_logits = write_greedily(model)
    assert counted.count == NEW_TOKENS - 1
    assert torch.equal(fast_tokens, tokens)
    distances = (fast_logits - logits).abs().amax(dim=1) / logits.std()
    # Roundings, of activations to int8 and of keys and values to half precision, can fall to
    # the other side of a half, and from then on the two caches differ.
    assert distances[0] < 1e-3
    assert distances.max() < (5e-3 if store == "f32" else 0.2)


@pytest.mark.parametrize("family", [*FAMILIES, *COMPRESSED, *STATEFUL])
def test_massive_activations_in_float32(family: str, tmp_path: Path) -> None:
    """A stream with values in the thousands takes the fast path, to the same tokens."""
    changes: dict[str, Any] = changes_of(family)
    model = load_family(family.split()[0], tmp_path, massive=True, **changes)
    tokens, logits = write_greedily(model)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    fast_tokens, fast_logits = write_greedily(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 5e-3 * logits.std()


@pytest.mark.parametrize(
    ("family", "store"), [*product(FAMILIES, STORES), *product([*COMPRESSED, *STATEFUL], ["f32"])]
)
def test_massive_activations_in_bfloat16(family: str, store: str, tmp_path: Path) -> None:
    """In bfloat16 the path is taken, too, and is at least as exact as transformers' code there.

    Exact is the same model in float32. All read the same tokens, one by one after the prompt.
    """
    changes: dict[str, Any] = changes_of(family)
    model = load_family(
        family.split()[0], tmp_path, store, dtype=torch.bfloat16, massive=True, **changes
    )
    path = install_fast_decode(model)
    assert path.fast, path.reason
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    wanted, found, theirs = (
        _step_by_step(forward, other.config, ids)
        for other in [open_model(tmp_path / "model", fast=False)]
        for forward in (other, model, model.slow)
    )
    apart, theirs_apart = ((logits - wanted).norm(dim=1) for logits in (found, theirs))
    assert apart.median() <= 1.2 * theirs_apart.median()


@torch.no_grad()
def _step_by_step(forward: Any, config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` float32 of all tokens but the first eight."""
    cache = DynamicCache(config=config)
    forward(input_ids=ids[:, :8], **cache_argument(cache), use_cache=True)
    steps = [
        forward(input_ids=ids[:, at : at + 1], **cache_argument(cache), use_cache=True)
        for at in range(8, ids.shape[1])
    ]
    return torch.cat([step.logits[0].float() for step in steps])


@pytest.mark.parametrize("family", COMPRESSED)
def test_quantized_products_of_a_compressed_cache(family: str, tmp_path: Path) -> None:
    """Fed the same tokens, both paths' logits are as near as the roundings that differ let them.

    transformers' code rounds every latent to int8 and then makes keys of it, ours rounds none.
    """
    changes = changes_of(family)
    model = load_family(family.split()[0], tmp_path, "q8_0", **changes)
    tokens = write_greedily(model)[0]
    path = install_fast_decode(model)
    assert path.fast, path.reason
    logits = []
    with torch.no_grad():
        for forward in (model, model.slow):
            cache = DynamicCache(config=model.config)
            forward(input_ids=PROMPT, **cache_argument(cache), use_cache=True)
            steps = [
                forward(input_ids=tokens[:, at : at + 1], **cache_argument(cache), use_cache=True)
                for at in range(PROMPT.shape[1], tokens.shape[1])
            ]
            logits.append(torch.cat([step.logits[:, -1] for step in steps]))
    found, wanted = logits
    distances = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert distances.median() < 0.08


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_beyond_a_sliding_window(family: str, tmp_path: Path) -> None:
    """A window of 8 with 27 positions: prompt and new tokens both leave it."""
    model = load_family(family, tmp_path, sliding_window=8)
    tokens, logits = write_greedily(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = write_greedily(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()


def test_yarn_and_partial_rotary_embeddings(tmp_path: Path) -> None:
    """Angles come from the model's own module, whatever its kind."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = load_family("qwen3_moe", tmp_path, rope_parameters=rope)
    tokens, logits = write_greedily(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = write_greedily(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()


def test_mixed_layers_and_tied_weights(tmp_path: Path) -> None:
    """A layer without experts, and an lm_head that is the embedding: one copy of its weights."""
    changes = {"mlp_only_layers": [0], "tie_word_embeddings": True}
    model = load_family("qwen3_moe", tmp_path, **changes)
    tokens, logits = write_greedily(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = write_greedily(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.packed.data_ptr() == model.lm_head.packed.data_ptr()


def test_dense_weights_are_packed_without_rounding(tmp_path: Path) -> None:
    """Weights that were bfloat16 are kept as bfloat16, others as float32; prefill is the same."""
    model = load_family("mixtral", tmp_path)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
        wanted = model(input_ids=PROMPT).logits
        assert install_fast_decode(model).fast
        assert model.lm_head.weight_format == "bf16"
        assert model.model.layers[0].self_attn.q_proj.weight_format == "f32"
        assert torch.allclose(model(input_ids=PROMPT).logits, wanted, atol=1e-4)
