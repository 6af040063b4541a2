"""The fast path below every way to generate: sampling, beams, crops, calls it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fast_models import (
    NEW_TOKENS,
    PROMPT,
    RANKS,
    CountedTokens,
    install_fast_decode,
    load_family,
    write_greedily,
)
from hybrid.transformers_api import cache_argument, returned_cache
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    model = load_family("qwen3_moe", tmp_path_factory.mktemp("qwen"))
    assert install_fast_decode(model).fast
    return model


def test_sampling_draws_the_same_tokens(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path sits below sampling: one seed, one text."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    found = []
    for forward in (qwen.forward, qwen.slow):
        monkeypatch.setattr(qwen, "forward", forward)
        torch.manual_seed(7)
        found.append(qwen.generate(PROMPT, max_new_tokens=12, pad_token_id=0, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 1, "use_cache": False},
    ],
    ids=["beams", "prompt lookup", "no cache"],
)
def test_other_ways_to_generate(
    qwen: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams reorder the cache, lookup feeds several tokens and crops: same result as without us."""
    found = []
    for forward in (qwen.forward, qwen.slow):
        monkeypatch.setattr(qwen, "forward", forward)
        repeated = PROMPT.repeat(1, 3)
        found.append(
            qwen.generate(repeated, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
        )
    assert torch.equal(*found)


def test_an_assistant_model(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding crops both models' caches after the fast path has written them."""
    wanted = write_greedily(qwen)[0]
    counted = CountedTokens(qwen, monkeypatch)
    monkeypatch.setattr(qwen.generation_config, "num_assistant_tokens", 4)
    monkeypatch.setattr(qwen.generation_config, "num_assistant_tokens_schedule", "constant")
    monkeypatch.setattr(qwen.generation_config, "assistant_confidence_threshold", 0.0)
    found = qwen.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, assistant_model=qwen
    )
    assert torch.equal(found, wanted)
    assert counted.count > 0


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a compressed cache, whose keys and values differ in size."""
    model = load_family("deepseek_v3", tmp_path_factory.mktemp("compressed"), **RANKS)
    assert install_fast_decode(model).fast
    return model


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("qwen", (1, 2, 24, 16), (1, 2, 24, 16)), ("compressed", (1, 1, 24, 32), (1, 1, 24, 8))],
)
def test_both_paths_take_turns_on_one_cache(
    name: str, keys: Any, values: Any, request: pytest.FixtureRequest
) -> None:
    """Single tokens, several at once, a crop, single tokens: as if computed in one piece."""
    qwen = request.getfixturevalue(name)
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        wanted = qwen.slow(input_ids=ids, use_cache=True).logits[0]
        found = [qwen(input_ids=ids[:, :6], **cache_argument(cache), use_cache=True).logits[0]]
        for start, stop in ((6, 7), (7, 8), (8, 12), (12, 13), (13, 14)):
            part = qwen(input_ids=ids[:, start:stop], **cache_argument(cache), use_cache=True)
            found.append(part.logits[0])
        qwen(input_ids=ids[:, :1], **cache_argument(cache), use_cache=True)
        cache.crop(-1)
        assert cache.get_seq_length() == 14
        for at in range(14, 24):
            part = qwen(input_ids=ids[:, at : at + 1], **cache_argument(cache), use_cache=True)
            found.append(part.logits[0])
    assert cache.layers[0].keys.shape == keys
    assert cache.layers[0].values.shape == values
    assert (torch.cat(found) - wanted).abs().max() < 1e-4 * wanted.std()


def test_calls_that_the_kernels_do_not_know(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked positions, inner states and gradients go to transformers, with its results."""
    counted = CountedTokens(qwen, monkeypatch)
    single = PROMPT[:, :1]
    with torch.no_grad():
        cache = returned_cache(qwen(input_ids=PROMPT, use_cache=True))
        out = qwen(input_ids=single, **cache_argument(cache), output_hidden_states=True)
        assert len(out.hidden_states) == 3
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[0, 3] = 0
        qwen(input_ids=single, **cache_argument(cache), attention_mask=mask)
        qwen(input_ids=single, **cache_argument(cache), labels=single)
    qwen(input_ids=single, **cache_argument(cache))  # gradients are asked for
    assert counted.count == 0
