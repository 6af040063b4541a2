"""Steps of several tokens of a text, beside transformers' code on the same weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import cpu_experts.decoder.decoder
import cpu_experts.decoder.kv
import hybrid.fast.decode
from fast_models import (
    COMPRESSED,
    FAMILIES,
    STATEFUL,
    STORES,
    CountedTokens,
    changes_of,
    feed,
    install_fast_decode,
    load_family,
    write,
)
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

IDS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))


def _load(family: str, folder: Path, store: str = "f32", **changes: Any) -> Any:
    changes |= changes_of(family)
    model = load_family(family.split()[0], folder, store, **changes)
    assert install_fast_decode(model).fast, model.hybrid_fast.path.reason
    return model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    return _load("qwen3_moe", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(autouse=True)
def nothing_refused_before(request: pytest.FixtureRequest) -> None:
    if "qwen" in request.fixturenames:
        request.getfixturevalue("qwen").hybrid_fast.refused.clear()


def _cut(forward: Any, config: Any, cuts: list[int]) -> Tensor:
    """Logits of the text, cut at these places."""
    cache = DynamicCache(config=config)
    places = zip([0, *cuts], [*cuts, IDS.shape[1]], strict=True)
    return torch.cat([feed(forward, IDS[:, start:stop], cache) for start, stop in places])


@pytest.mark.parametrize(
    ("family", "store"), [*product(FAMILIES, STORES), *product([*COMPRESSED, *STATEFUL], ["f32"])]
)
def test_a_family_in_steps(
    family: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of several lengths and single tokens between them: the logits of one forward."""
    model = _load(family, tmp_path, store)
    counted = CountedTokens(model, monkeypatch)
    found = _cut(model, model.config, [7, 8, 10, 11, 19, 24])
    wanted = _cut(model.slow, model.config, [])
    distances = (found - wanted).abs().amax(dim=1) / wanted.std()
    assert counted.steps == [(1, 7), (1, 2), (1, 8), (1, 5), (1, 16)]
    assert counted.count == 2
    # Roundings, to int8 and of keys and values to half precision, can fall to the other side.
    assert distances.median() < (1e-3 if store == "f32" else 0.05)
    assert distances.max() < (2e-2 if store == "f32" else 0.3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_steps_beyond_a_window(family: str, tmp_path: Path) -> None:
    """Tokens of a step that see different parts of what a window of 8 leaves."""
    model = _load(family, tmp_path, sliding_window=8)
    found = _cut(model, model.config, [5, 6, 18, 21])
    wanted = _cut(model.slow, model.config, [])
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()


@pytest.mark.parametrize("tokens", [31, 32, 33, 40])
def test_more_tokens_than_a_step_has(
    qwen: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a prompt; the next step goes on behind it."""
    counted = CountedTokens(qwen, monkeypatch)
    with torch.no_grad():
        wanted = qwen.slow(input_ids=IDS[:, :tokens], use_cache=True).logits[0]
    cache = DynamicCache(config=qwen.config)
    found = feed(qwen, IDS[:, :tokens], cache)
    assert counted.steps == ([(1, tokens)] if tokens <= hybrid.fast.decode.STEP else [])
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()
    more = feed(qwen, IDS[:, :3], cache)
    slow = DynamicCache(config=qwen.config)
    feed(qwen.slow, IDS[:, :tokens], slow)
    assert (more - feed(qwen.slow, IDS[:, :3], slow)).abs().max() < 5e-3 * wanted.std()
    assert not qwen.hybrid_fast.refused


@pytest.mark.parametrize("keep", [0, 1, 3, 99, torch.tensor([4, 1]), torch.tensor([-1])], ids=str)
def test_the_logits_that_are_kept(qwen: Any, keep: Any) -> None:
    """All, the last ones, or those of some places, as transformers has it."""
    ids = IDS[:, :6]
    found, wanted = (
        feed(forward, ids, DynamicCache(config=qwen.config), logits_to_keep=keep)
        for forward in (qwen, qwen.slow)
    )
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral with a window"])
def test_a_cropped_cache_goes_on(family: str, tmp_path: Path) -> None:
    """Steps of which only a part is kept, as speculation has them; crops leave the layout alone."""
    changes = {"sliding_window": 6} if "window" in family else {}
    model = _load(family.split()[0], tmp_path, **changes)
    found = {}
    for name, forward in (("ours", model), ("theirs", model.slow)):
        cache = DynamicCache(config=model.config)
        rows, at = [feed(forward, IDS[:, :9], cache)], 9
        cache.activate_past_recording()
        for accepted in (2, 0, 4, 1):
            draft = torch.cat((IDS[:, at : at + accepted + 1], IDS[:, : 4 - accepted]), dim=1)
            rows.append(feed(forward, draft, cache)[: accepted + 1])
            cache.crop(accepted - 4)
            at += accepted + 1
            assert cache.get_seq_length() == at
        rows.append(feed(forward, IDS[:, at : at + 1], cache))
        found[name] = torch.cat(rows)
    assert not model.hybrid_fast.refused
    assert (found["ours"] - found["theirs"]).abs().max() < 5e-3 * found["theirs"].std()


def test_a_cache_that_records_keeps_what_it_may_go_back_to(tmp_path: Path) -> None:
    """Hundreds of tokens taken back beyond a window: the buffer has grown, and forgot nothing."""
    model = _load("mixtral", tmp_path, sliding_window=6)
    cache = DynamicCache(config=model.config)
    feed(model, IDS[:, :20], cache)
    cache.activate_past_recording()
    for _ in range(20):
        feed(model, IDS[:, :30], cache)
    cache.crop(-600)
    assert cache.get_seq_length() == 20
    found = feed(model, IDS[:, 20:24], cache)
    wanted = _cut(model.slow, model.config, [])[20:24]
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()
    assert not model.hybrid_fast.refused


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("where", ["behind the kernels", "while buffers grow"])
def test_an_interrupt_leaves_the_cache_as_before(
    window: int | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step has written by then counts for nothing; the text goes on."""
    model = _load("mixtral", tmp_path, sliding_window=window)
    ids = torch.randint(0, VOCAB, (1, 520), generator=torch.Generator().manual_seed(3))
    cache, past = DynamicCache(config=model.config), 509  # the buffers have room for 512
    feed(model, ids[:, :past], cache)
    owner, name = {
        "behind the kernels": (cpu_experts.decoder.decoder, "decode_tokens"),
        "while buffers grow": (cpu_experts.decoder.kv, "_made"),
    }[where]
    real, calls = getattr(owner, name), 0

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        made = real(*args)
        if calls == (1 if where == "behind the kernels" else 2):
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, ids[:, :5], cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [past, past]
    found = feed(model, ids[:, past : past + 5], cache)
    with torch.no_grad():
        wanted = model.slow(input_ids=ids[:, : past + 5]).logits[0, past:]
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()


OPTIONS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "sampled lookup": {"prompt_lookup_num_tokens": 4, "do_sample": True, "temperature": 0.5},
}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("name", OPTIONS)
def test_prompt_lookup(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' own drafts are steps, beyond a window, too; the tokens are the same."""
    changes = {"sliding_window": 8} if family == "gpt_oss" else {}
    model = _load(family, tmp_path, **changes)
    counted, ids, found = CountedTokens(model, monkeypatch), IDS[:, :7].repeat(1, 3), []
    for forward in (model.forward, model.slow):
        monkeypatch.setattr(model, "forward", forward)
        torch.manual_seed(1)
        found.append(write(model, ids, **OPTIONS[name]))
    assert torch.equal(*found)
    assert not model.hybrid_fast.refused
    assert len(counted.steps) > (1 if name == "prompt lookup" else 0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_assistant_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and assistant crop their caches after every step, beyond a window, too."""
    changes = {"sliding_window": 8} if family == "gpt_oss" else {}
    model, other = (_load(family, tmp_path / name, **changes) for name in ("model", "other"))
    other.generation_config.num_assistant_tokens = 4
    other.generation_config.assistant_confidence_threshold = 0.0
    counted = CountedTokens(model, monkeypatch)
    found = write(model, assistant_model=other)
    assert not model.hybrid_fast.refused
    assert not other.hybrid_fast.refused
    assert len(counted.steps) > 1
    monkeypatch.setattr(model, "forward", model.slow)
    assert torch.equal(found, write(model))
