"""Families with gated delta rules on the fast path, beside transformers' code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from fast_models import (
    BATCH,
    PROMPT,
    CountedTokens,
    feed,
    install_fast_decode,
    load_family,
    open_model,
    write,
)
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

#: Queries and keys project in one product there, apart from gates here; two value heads a key head.
RECURRENT = ["qwen3_next", "qwen3_5_moe_text"]
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 32}
IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))


def _load(family: str, folder: Path, **options: Any) -> Any:
    return load_family(family, folder, **SIZES, **options)


@pytest.fixture(scope="module", params=RECURRENT)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    made = _load(request.param, tmp_path_factory.mktemp(request.param))
    assert install_fast_decode(made).fast, made.hybrid_fast.path.reason
    return made


@pytest.fixture(autouse=True)
def nothing_refused_before(request: pytest.FixtureRequest) -> None:
    if "model" in request.fixturenames:
        request.getfixturevalue("model").hybrid_fast.refused.clear()


def _states(cache: Any) -> list[Tensor]:
    """What the layers keep, in transformers' tensors."""
    found: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            assert layer.has_previous_state[0]
            found += [layer.conv_states[0], layer.recurrent_states[0]]
        else:
            found += [layer.keys, layer.values]
    return found


def _same(mine: Any, theirs: Any) -> None:
    for found, wanted in zip(_states(mine), _states(theirs), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_any_mixture_keeps_the_same_state(model: Any) -> None:
    """Prompts of both kinds, steps and single tokens: logits and all states are transformers'."""
    mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
    start = 0
    for tokens in (1, 1, 5, 1, 1, 2, 1, 3):
        ids = IDS[:, start : start + tokens]
        found, wanted = feed(model, ids, mine), feed(model.slow, ids, theirs)
        assert (found - wanted).abs().max() < 5e-3 * wanted.std()
        start += tokens
    _same(mine, theirs)
    for ids in (IDS.repeat(1, 2), IDS[:, :1], IDS[:, :4]):  # after others have read the tensors
        found, wanted = feed(model, ids, mine), feed(model.slow, ids, theirs)
        assert (found - wanted).abs().max() < 1e-2 * wanted.std()
    _same(mine, theirs)
    assert not model.hybrid_fast.refused


@pytest.mark.parametrize("family", RECURRENT)
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """At least as near to float32 as transformers' code in bfloat16."""
    model = _load(family, tmp_path, dtype=torch.bfloat16)
    exact = open_model(tmp_path / "model", fast=False)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    rows = []
    for forward in (exact, model, model.slow):
        cache = DynamicCache(config=model.config)
        feed(forward, IDS[:, :8], cache)
        rows.append(torch.cat([feed(forward, IDS[:, at : at + 1], cache) for at in range(8, 24)]))
    wanted, found, theirs = (row.float() for row in rows)
    apart, theirs_apart = ((logits - wanted).norm(dim=1) for logits in (found, theirs))
    assert apart.median() <= 1.2 * theirs_apart.median()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_go_their_own_way(model: Any, copied: Any) -> None:
    """A snapshot of every layer holds what it held, whatever comes after it."""
    cache, twin = DynamicCache(config=model.config), DynamicCache(config=model.config)
    feed(model, IDS[:, :6], cache)
    feed(model, IDS[:, 6:7], cache)
    kept = DynamicCache(config=model.config)
    kept.layers = [copied(layer) for layer in cache.layers]
    first = feed(model, IDS[:, 7:8], cache)
    feed(model, IDS[:, 20:23], cache)
    again = feed(model, IDS[:, 7:8], kept)
    assert (first - again).abs().max() < 1e-3 * first.std()
    feed(model.slow, IDS[:, :8], twin)
    _same(kept, twin)


def test_beams_and_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams choose among states; texts of a batch write what each does alone."""
    counted = CountedTokens(model, monkeypatch)
    alone = [write(model, row[None]) for row in BATCH]
    assert torch.equal(write(model, BATCH), torch.cat(alone))
    assert counted.steps
    fast = write(model, num_beams=3)
    monkeypatch.setattr(model, "hybrid_fast", None)
    assert torch.equal(fast, write(_open_slow(model), num_beams=3))


def _open_slow(model: Any) -> Any:
    """The same model without the fast path."""
    return open_model(Path(model.config._name_or_path), fast=False)


def test_padding_within_a_step_is_transformers(model: Any) -> None:
    """A state would take in what is no part of a text; behind it the kernels go on."""
    short = torch.cat((torch.zeros(1, 3, dtype=torch.long), PROMPT[:, :4]), dim=1)
    ids = torch.cat((PROMPT, short))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = write(model, ids, attention_mask=mask)
    alone = write(model, PROMPT[:, :4])
    assert torch.equal(found[1, 7:], alone[0, 4 : 4 + found.shape[1] - 7])
    assert list(model.hybrid_fast.refused) == ["a prompt of masked positions"]
