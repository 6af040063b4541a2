"""Prompts of a loaded model: in pieces, told as they go, the same as transformers' own."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

import hybrid.fast.decode
import hybrid.fast.prompt
from fast_models import install_fast_decode, load_family, write_greedily
from hybrid.fast.decode import FastDecoder
from hybrid.fast.prompt import Piece, PromptProgress, prompt_bar, prompts_told
from hybrid.transformers_api import cache_argument
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")

IDS = torch.randint(0, VOCAB, (1, 22), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    model = load_family("qwen3_moe", tmp_path_factory.mktemp("qwen"))
    assert install_fast_decode(model).fast
    return model


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prompts of few tokens be prompts, in several pieces."""
    monkeypatch.setattr(hybrid.fast.decode, "STEP", 1)
    monkeypatch.setattr(hybrid.fast.prompt, "PIECE", 4)
    monkeypatch.setattr(hybrid.fast.prompt, "_LONG", 8)


@torch.no_grad()
def _prompt(model: Any, **options: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=IDS, **cache_argument(cache), use_cache=True, **options).logits
    assert cache.get_seq_length() == IDS.shape[1]
    return logits[0]


@pytest.mark.parametrize("keep", [0, 1, 3, 7])
def test_pieces_give_the_logits_of_one_prompt(
    qwen: Any, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits, the last, and some of the last two pieces; attention is ours in every layer."""
    calls: list[int] = []
    real = Piece.attend

    def attend(self: Piece, index: int, *rest: Any) -> Any:
        calls.append(index)
        return real(self, index, *rest)

    with torch.no_grad():
        wanted = qwen.slow(input_ids=IDS, use_cache=True, logits_to_keep=keep).logits[0]
    monkeypatch.setattr(Piece, "attend", attend)
    found = _prompt(qwen, logits_to_keep=keep)
    assert calls == [0, 1] * 6
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()


def test_chosen_places_of_logits(qwen: Any) -> None:
    """Places instead of a number: the prompt stays in one piece."""
    found = _prompt(qwen, logits_to_keep=torch.tensor([2, 20]))
    wanted = _prompt(qwen)[[2, 20]]
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_pieces_and_a_sliding_window(family: str, tmp_path: Path) -> None:
    """A window of 6 over pieces of 4, then single tokens: as transformers does it."""
    model = load_family(family, tmp_path, sliding_window=6)
    tokens, logits = write_greedily(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = write_greedily(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 5e-3 * logits.std()


SHORT_AND_LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0 + pair for pair in range(8)]}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 9}
        | SHORT_AND_LONG,
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_prompt_that_turns_by_its_own_length_is_one_piece(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    """Beyond the trained length all its positions turn as the last one does, from the first on."""
    rope = {"rope_parameters": scaling | {"rope_theta": 1e4}}
    model = load_family("qwen3_moe", tmp_path, max_position_embeddings=9, **rope)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=True).logits[0]
    assert install_fast_decode(model).fast
    found = _prompt(model)
    assert (found - wanted).abs().amax(-1).median() < 5e-3 * wanted.std()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32768}
        | SHORT_AND_LONG,
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_far_positions_turn_as_transformers_turns_them(qwen: Any, scaling: dict[str, Any]) -> None:
    """Cosines and sines of positions around and far beyond 32k, for every kind of scaling."""
    config = copy.deepcopy(qwen.config)
    config.max_position_embeddings = 32768 if scaling["rope_type"] == "dynamic" else 131072
    config.rope_parameters = scaling | {"rope_theta": 1e6}
    kind = type(qwen.model.rotary_emb)
    base = SimpleNamespace(rotary_emb=kind(config), layers=[])
    model = SimpleNamespace(get_decoder=lambda: base, dtype=torch.float32, config=config)
    fast = FastDecoder(model, qwen.hybrid_fast.decoder.decoder, 8)
    for position in (0, 511, 512, 32767, 32768, 32769, 50000, 131071):
        cos, sin = kind(config)(torch.empty(1), torch.tensor([[position]]))
        found = fast.rotary(position)
        assert torch.equal(torch.from_numpy(found[0]), cos[0, 0, :8])
        assert torch.equal(torch.from_numpy(found[1]), sin[0, 0, :8])


def test_progress_is_told_piece_by_piece(qwen: Any) -> None:
    """Tokens so far and in all, a rate and the time left; nobody is told afterwards."""
    told: list[PromptProgress] = []
    with prompts_told(qwen, told.append):
        _prompt(qwen)
    _prompt(qwen)
    assert [at.done for at in told] == [4, 8, 12, 16, 20, 22]
    assert {at.total for at in told} == {22}
    assert all(at.tokens_per_s > 0 for at in told)
    assert told[0].left_s > 0 == told[-1].left_s
    assert PromptProgress(0, 5, 0.0).left_s == float("inf")


def test_leaving_a_prompt_leaves_the_model_usable(qwen: Any) -> None:
    """An exception from the callback comes through; the next prompt is whole."""

    def stop(at: PromptProgress) -> None:
        raise KeyboardInterrupt

    wanted = _prompt(qwen)
    with pytest.raises(KeyboardInterrupt), prompts_told(qwen, stop):
        _prompt(qwen)
    assert torch.equal(_prompt(qwen), wanted)


@pytest.mark.parametrize("cut", ["while redirecting", "while restoring"])
def test_an_interrupt_between_layers_leaves_the_model_usable(
    qwen: Any, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it left of a piece leads nowhere, in any code path, and the next prompt is whole."""
    wanted = _prompt(qwen)
    with torch.no_grad():
        slow = qwen.slow(input_ids=IDS, use_cache=False).logits
    name = {"while redirecting": "_redirected", "while restoring": "restore_forward"}[cut]
    real, calls = getattr(hybrid.fast.prompt, name), 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        # The second layer's redirection, or restoring the first after the prompt.
        if calls == (2 if cut == "while redirecting" else 3):
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hybrid.fast.prompt, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            _prompt(qwen)
    if cut == "while restoring":
        assert any("forward" in vars(layer.self_attn) for layer in qwen.model.layers)
    with torch.no_grad():  # transformers' own code, of a batch
        batch = qwen(input_ids=IDS.repeat(2, 1), use_cache=False).logits
    assert (batch[1:] - slow).abs().max() < 1e-3 * slow.std()
    assert torch.equal(_prompt(qwen), wanted)
    assert not any("forward" in vars(layer.self_attn) for layer in qwen.model.layers)


def test_the_bar_is_shown_for_long_prompts_only(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and rate on a terminal; nothing for a short prompt."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with prompt_bar(qwen, console):
        _prompt(qwen)
    assert "reading the prompt" in screen.getvalue()
    assert "22 tokens" in screen.getvalue()
    monkeypatch.setattr(hybrid.fast.prompt, "_LONG", 100)
    before = screen.getvalue()
    with prompt_bar(qwen, console):
        _prompt(qwen)
    assert screen.getvalue() == before


def test_a_model_without_the_fast_path_tells_nothing() -> None:
    """It computes as it does; nobody is called."""
    with prompts_told(SimpleNamespace(), pytest.fail), prompt_bar(SimpleNamespace()):
        pass


def test_prompts_of_a_compressed_cache(tmp_path: Path) -> None:
    """Transformers' attention over the pieces: the logits of one prompt, and progress is told."""
    model = load_family("deepseek_v2", tmp_path)
    assert install_fast_decode(model).fast
    with torch.no_grad():
        wanted = model.slow(input_ids=IDS, use_cache=True).logits[0]
    told: list[PromptProgress] = []
    with prompts_told(model, told.append):
        found = _prompt(model)
    assert [at.done for at in told] == [4, 8, 12, 16, 20, 22]
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
