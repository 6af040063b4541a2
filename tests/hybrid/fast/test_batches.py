"""Batches of texts on the fast path: every row is the same text alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fast_models import (
    COMPRESSED,
    RANKS,
    CountedTokens,
    install_fast_decode,
    load_family,
    write,
)
from hybrid.transformers_api import cache_argument, returned_cache
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

_drawn = torch.Generator().manual_seed(4)
FAMILIES = {
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8},
    "mixtral": {"sliding_window": 6},
    "granitemoe": {},
    "glm4_moe": {},
    "deepseek_v3": RANKS | COMPRESSED["deepseek_v3"],
}


def _texts(*lengths: int) -> list[Tensor]:
    return [torch.randint(1, VOCAB, (1, length), generator=_drawn) for length in lengths]


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The texts as rows of the same length, filled up in front, and the mask of what is theirs."""
    longest = max(text.shape[1] for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - text.shape[1] :] = text[0]
        mask[row, longest - text.shape[1] :] = 1
    return ids, mask


def _load(family: str, folder: Path) -> Any:
    model = load_family(family, folder, **FAMILIES[family])
    assert install_fast_decode(model).fast, model.hybrid_fast.path.reason
    return model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    return _load("qwen3_moe", tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("lengths", [(7, 4, 7), (9, 20)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_texts_alone(
    family: str, lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens of a batch, filled up in front, beside transformers' code for every text.

    Short prompts are steps, too; those of a long batch are transformers'.
    """
    model, texts = _load(family, tmp_path), _texts(*lengths)
    ids, mask = _padded(texts)
    counted = CountedTokens(model, monkeypatch)
    found = write(model, ids, attention_mask=mask)
    short = ids.numel() <= 32
    prompt = [tuple(ids.shape)] if short else []
    assert counted.steps == [*prompt, *[(len(texts), 1)] * 11]
    refused = {} if short else {f"prompts of {len(texts)} sequences at once": 1}
    assert model.hybrid_fast.refused == refused
    monkeypatch.setattr(model, "forward", model.slow)
    for row, text in zip(found, texts, strict=True):
        assert torch.equal(row[-12:], write(model, text)[0, -12:])


def test_steps_of_several_texts(qwen: Any) -> None:
    """Several tokens of each text of a batch at a time, whose logits are the texts' own."""
    texts = _texts(12, 9)
    ids, mask = _padded(texts)
    cache, rows = DynamicCache(config=qwen.config), []
    qwen.hybrid_fast.refused.clear()
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            out = qwen(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                **cache_argument(cache),
            )
            rows.append(out.logits)
        wanted = [qwen.slow(input_ids=text).logits[0] for text in texts]
    found = torch.cat(rows, dim=1)
    assert not qwen.hybrid_fast.refused
    for row, text in zip(found, wanted, strict=True):
        assert (row[-len(text) :] - text).abs().max() < 5e-3 * text.std()


def test_a_single_text_that_is_filled_up(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one row with something in front of it."""
    (text,) = _texts(6)
    ids, mask = _padded([text, *_texts(10)])
    qwen.hybrid_fast.refused.clear()
    found = write(qwen, ids[:1], attention_mask=mask[:1])
    assert not qwen.hybrid_fast.refused
    monkeypatch.setattr(qwen, "forward", qwen.slow)
    assert torch.equal(found[0, -12:], write(qwen, text)[0, -12:])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_beams(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chosen anew at every token: the same tokens as without the path, all in steps."""
    model = _load(family, tmp_path)
    (text,) = _texts(6)
    counted = CountedTokens(model, monkeypatch)
    found = write(model, text, num_beams=3, num_return_sequences=2)
    assert not model.hybrid_fast.refused
    assert counted.steps == [(3, 6), *[(3, 1)] * 11]
    monkeypatch.setattr(model, "forward", model.slow)
    assert torch.equal(found, write(model, text, num_beams=3, num_return_sequences=2))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_cache_whose_texts_are_chosen(family: str, tmp_path: Path) -> None:
    """Fewer, more and reordered texts, and a copy of all: as transformers' tensors have them."""
    model = _load(family, tmp_path)
    ids, token = torch.cat(_texts(9, 9, 9)), torch.tensor([[4], [5]])
    found = []
    for forward in (model, model.slow):
        rows = []
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            forward(input_ids=ids, **cache_argument(cache))
            forward(input_ids=ids[:, :1], **cache_argument(cache))
            copied = copy.deepcopy(cache)
            cache.batch_select_indices(torch.tensor([2, 0]))
            rows.append(forward(input_ids=token, **cache_argument(cache)).logits)
            cache.reorder_cache(torch.tensor([1, 1]))
            rows.append(forward(input_ids=token, **cache_argument(cache)).logits)
            cache.batch_repeat_interleave(2)
            rows.append(forward(input_ids=token.repeat(2, 1), **cache_argument(cache)).logits)
            rows.append(forward(input_ids=ids[:, :2], **cache_argument(copied)).logits)
        found.append(torch.cat([part.reshape(-1, part.shape[-1]) for part in rows]))
        shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
        found.append(torch.tensor(shapes))
    assert not model.hybrid_fast.refused
    assert (found[0] - found[2]).abs().max() < 5e-3 * found[2].std()
    assert torch.equal(found[1], found[3])


def test_another_number_of_texts_than_a_cache_has(qwen: Any) -> None:
    """Transformers' own error, and the cache goes on as it was."""
    ids = torch.cat(_texts(5, 5))
    with torch.no_grad():
        cache = returned_cache(qwen(input_ids=ids, use_cache=True))
        with pytest.raises(RuntimeError):
            qwen(input_ids=ids[:1, :2], **cache_argument(cache))
        found = qwen(input_ids=ids[:, :1], **cache_argument(cache)).logits[:, -1]
        wanted = qwen.slow(input_ids=torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()


def test_a_row_that_is_no_number(tmp_path: Path) -> None:
    """A token whose embedding is NaN spoils its own text and no other."""
    model = load_family("qwen3_moe", tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = float("nan")
    assert install_fast_decode(model).fast
    ids = torch.cat(_texts(6, 6, 6)).clamp(max=VOCAB - 2)
    found = []
    for spoilt in (False, True):
        cache = DynamicCache(config=model.config)
        token = torch.tensor([[7], [VOCAB - 1 if spoilt else 8], [9]])
        with torch.no_grad():
            for part in (ids, token, token.clamp(max=20)):
                logits = model(input_ids=part, **cache_argument(cache)).logits[:, -1]
        found.append(logits)
    assert found[1][1].isnan().all()
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])
    assert not model.hybrid_fast.refused
