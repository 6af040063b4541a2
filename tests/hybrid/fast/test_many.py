"""Many sequences at once, beside transformers' code on each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hybrid.fast.many
from cpu_experts.decoder.pages import PAGE, Pages, PagesFull
from fast_models import COMPRESSED, FAMILIES, changes_of, install_fast_decode, load_family
from hybrid.fast.many import ManySequences
from hybrid.transformers_api import cache_argument
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

LENGTHS = (PAGE + 30, 5, 40, 2 * PAGE)
IDS = torch.randint(0, VOCAB, (4, 160), generator=torch.Generator().manual_seed(3))


def _load(family: str, folder: Path, **changes: Any) -> Any:
    changes |= changes_of(family)
    model = load_family(family.split()[0], folder, "f32", **changes)
    assert install_fast_decode(model).fast, model.hybrid_fast.path.reason
    return model


def _many(model: Any, sequences: int = 4, size_bytes: int = 1 << 26) -> ManySequences:
    fast = model.hybrid_fast.decoder
    assert ManySequences.unfit(fast) is None
    return ManySequences(model, fast, fast.decoder.new_pages(size_bytes, sequences))


def _wanted(model: Any, at: int) -> Tensor:
    """Transformers' logits of a whole sequence."""
    return _logits(model, IDS[at])


def _logits(model: Any, ids: Tensor) -> Tensor:
    cache = cache_argument(DynamicCache(config=model.config))
    logits: Tensor = model.slow(input_ids=ids[None], **cache, use_cache=True).logits[0]
    return logits


def _alike(found: Tensor, wanted: Tensor, scale: Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() < 2e-2 * scale.float().std()


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *COMPRESSED])
def test_sequences_of_a_family(family: str, tmp_path: Path) -> None:
    """Prompts of other lengths, some in two pieces, then steps of all, of some and of one."""
    model = _load(family, tmp_path)
    many = _many(model)
    wanted = [_wanted(model, at) for at in range(len(IDS))]
    sequences, done = [many.pages.open() for _ in IDS], list(LENGTHS)
    for at, (sequence, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
        many.prompt(sequence, IDS[at, : length // 2].tolist())
        logits = many.prompt(sequence, IDS[at, length // 2 : length].tolist())
        _alike(logits, wanted[at][length - 1], wanted[at])
    for picked, count in (((0, 1, 2, 3), 1), ((1, 3), 1), ((0, 2, 3), 3), ((2,), 1), ((2, 0), 1)):
        given = [(sequences[at], IDS[at, done[at] : done[at] + count].tolist()) for at in picked]
        for at, logits in zip(picked, many.step(given), strict=True):
            done[at] += count
            _alike(logits, wanted[at][done[at] - 1], wanted[at])
    many.pages.check_integrity()


@torch.no_grad()
def test_a_fork_of_a_prompt(tmp_path: Path) -> None:
    """Another end of the same beginning."""
    model = _load("qwen3_moe", tmp_path)
    many = _many(model)
    one = many.pages.open()
    many.prompt(one, IDS[0, :70].tolist())
    other = one.fork()
    many.prompt(one, IDS[0, 70:110].tolist())
    ids = torch.cat((IDS[0, :70], IDS[1, :50]))
    found = many.prompt(other, ids[70:].tolist())
    wanted = _logits(model, ids)
    _alike(found, wanted[-1], wanted)
    found = many.step([(one, IDS[0, 110:111].tolist())])[0]
    _alike(found, _wanted(model, 0)[110], _wanted(model, 0))


@torch.no_grad()
@pytest.mark.parametrize("length", [20, 50])
def test_what_breaks_a_prompt_off_leaves_it_as_before(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in a layer, and memory that has too few pages."""
    model = _load("qwen3_moe", tmp_path)
    size = _many(model).pages.page_bytes
    many = _many(model, size_bytes=2 * size)
    sequence = many.pages.open()
    many.prompt(sequence, IDS[0, :40].tolist())
    with pytest.raises(PagesFull):
        many.prompt(sequence, IDS[0, 40:140].tolist())
    assert sequence.length() == 40
    with monkeypatch.context() as patch:
        norm = model.model.layers[1].post_attention_layernorm
        patch.setattr(norm, "forward", _interrupted)
        patch.setattr(hybrid.fast.many.FastDecoder, "rotary", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            many.prompt(sequence, IDS[0, 40 : 40 + length].tolist())
    assert {sequence.length(layer) for layer in range(2)} == {40}
    wanted = _wanted(model, 0)
    found = many.prompt(sequence, IDS[0, 40 : 40 + length].tolist())
    _alike(found, wanted[40 + length - 1], wanted)
    many.pages.check_integrity()
    assert isinstance(many.pages, Pages)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_positions_that_turn_by_length_are_not_computed_together(tmp_path: Path) -> None:
    """The reason is told."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = _load("qwen3_moe", tmp_path, rope_parameters=rope)
    assert "depends on how long" in str(ManySequences.unfit(model.hybrid_fast.decoder))
