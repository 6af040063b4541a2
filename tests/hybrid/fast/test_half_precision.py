"""Keys and values beyond half precision, which the kernels' cache is in, spoil no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fast_models import install_fast_decode, load_family, write_greedily
from hybrid.fast.prompt import PIECE
from hybrid.transformers_api import cache_argument

#: A token that no test of a decoder uses, and a channel that no other token has.
LARGE, CHANNEL = 50, 7


def load(folder: Path, large: float, **changes: Any) -> Any:
    """A model in whose first layer one token, ``LARGE``, has a key that is so large."""
    model = load_family("mixtral", folder, **changes)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, CHANNEL] = 0
        embedding[LARGE] = 0
        embedding[LARGE, CHANNEL] = 1
        model.model.layers[0].self_attn.k_proj.weight[0, CHANNEL] = large
    return model


@torch.no_grad()
def logits_of(forward: Any, config: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logits of all tokens after a prompt of so many, ``[T, V]``."""
    cache = DynamicCache(config=config)
    cuts = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, ids.shape[1]))]
    found = [
        forward(input_ids=ids[:, cut], use_cache=True, **cache_argument(cache)).logits[0, -1]
        for cut in cuts
    ]
    return torch.stack(found)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("where", ["prompt", "single token", "second piece"])
def test_a_large_key_is_computed_by_transformers(
    where: str, window: int | None, tmp_path: Path
) -> None:
    """The logits are transformers' before it, at it and after it, wherever it comes.

    When it has left the window of all layers the kernels go on.
    """
    model = load(tmp_path, 1e6, sliding_window=window, max_position_embeddings=2048)
    assert install_fast_decode(model).fast
    prompt = PIECE + 40 if where == "second piece" else 20
    ids = torch.randint(0, 40, (1, prompt + 6), generator=torch.Generator().manual_seed(1))
    ids[0, {"prompt": 5, "single token": prompt + 2, "second piece": PIECE + 9}[where]] = LARGE
    wanted = logits_of(model.slow, model.config, ids, prompt)
    found = logits_of(model, model.config, ids, prompt)
    assert wanted.isfinite().all()
    # Scores in the thousands of thousands show the rounding of every other key, too.
    assert (found - wanted).norm() < 1e-2 * wanted.norm()
    steps = 4 if where == "single token" else 6 if window is None else 0
    steps += where == "prompt"  # it is a step itself
    assert sum(model.hybrid_fast.refused.values()) == steps


def test_a_large_key_in_a_step(tmp_path: Path) -> None:
    """The step is transformers' then, and the cache has each of its tokens once."""
    model = load(tmp_path, 1e6, sliding_window=None)
    assert install_fast_decode(model).fast
    ids, found = torch.tensor([[1, 2, 3, 4, LARGE, 6, 7, 8, 9]]), []
    for forward in (model, model.slow):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                forward(input_ids=ids[:, cut], use_cache=True, **cache_argument(cache)).logits[0]
                for cut in (slice(2), slice(2, 6), slice(6, 9))
            ]
        found.append(torch.cat(parts))
        assert cache.get_seq_length() == 9
    assert found[1].isfinite().all()
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()
    assert dict(model.hybrid_fast.refused) == {
        "keys or values beyond half precision": 1,
        "a cache that the kernels cannot take over": 1,
    }


def test_a_model_of_large_keys_is_refused_with_the_cause(tmp_path: Path) -> None:
    """Where no text could be computed the test of the decoder says so, and transformers writes."""
    model = load_family("mixtral", tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1e6
    wanted, _ = write_greedily(model)
    path = install_fast_decode(model)
    assert not path.fast
    assert "keys or values are beyond half precision" in path.reason
    assert torch.equal(write_greedily(model)[0], wanted)
