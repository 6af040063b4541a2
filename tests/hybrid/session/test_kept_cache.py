"""What a turn leaves for the next: with windows that were exceeded, after Ctrl-C, on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.session.conversation import Conversation
from hybrid.session.kept_cache import KeptCache
from hybrid.session.model import HybridModel
from tiny_families import families, tiny_config
from tiny_model import TEMPLATE, byte_tokenizer

WINDOW = 16
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> HybridModel:
    """A model of which every second layer sees few tokens back."""
    directory = tmp_path_factory.mktemp("windowed")
    kind, model_kind = families()["gpt_oss"]
    torch.manual_seed(1)
    config = tiny_config(kind, sliding_window=WINDOW, vocab_size=256, max_position_embeddings=512)
    network = model_kind._from_config(config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    model = HybridModel.from_pretrained(directory, experts="f32", dtype="float32", threads=1)
    assert any(layer.is_sliding for layer in KeptCache().begin(model.model, ids(3)).layers)
    model.tokenizer.chat_template = TEMPLATE
    return model


def ids(count: int, seed: int = 0) -> torch.Tensor:
    found: torch.Tensor = torch.randint(97, 123, (1, count), generator=torch.manual_seed(seed))
    return found


def scratch(model: HybridModel, prompt: torch.Tensor) -> str:
    return model.answer(prompt, **GREEDY)


def test_thoughts_beyond_a_window_are_gone_back_over(windowed: HybridModel) -> None:
    """A turn whose answer is not sent again as it was: what came before it is not computed anew."""
    kept, prompt = KeptCache(), ids(40)
    windowed.answer(prompt, kept=kept, **GREEDY)
    for turn in (1, 2):
        longer = torch.cat((prompt, ids(9, seed=turn)), dim=1)
        wanted = scratch(windowed, longer)
        assert windowed.answer(longer, kept=kept, **GREEDY) == wanted
        assert windowed._last is not None
        assert windowed._last.times.kept_tokens == prompt.shape[1]
        prompt = longer
    other = ids(60, seed=9)
    wanted = scratch(windowed, other)
    assert windowed.answer(other, kept=kept, **GREEDY) == wanted
    assert windowed._last.times.kept_tokens == 0


def test_a_window_that_was_not_exceeded_is_cut(windowed: HybridModel) -> None:
    """Shorter than it, a sequence goes back to any token of it."""
    kept, prompt = KeptCache(), ids(6)
    windowed.answer(prompt, kept=kept, do_sample=False, max_new_tokens=3)
    longer = torch.cat((prompt[:, :4], ids(5, seed=3)), dim=1)
    wanted = scratch(windowed, longer)
    assert windowed.answer(longer, kept=kept, **GREEDY) == wanted
    assert windowed._last is not None
    assert windowed._last.times.kept_tokens == 4


@pytest.mark.parametrize("kind", ["full", "windowed"])
@pytest.mark.parametrize("after", [1, 5])
def test_an_answer_that_was_stopped_is_gone_on_from(
    kind: str, after: int, windowed: HybridModel, tiny_model: Path
) -> None:
    """After Ctrl-C the next turn computes its own tokens, and is the same as from scratch."""
    model = windowed
    if kind == "full":
        model = HybridModel.from_pretrained(tiny_model, threads=1)
        model.tokenizer.chat_template = TEMPLATE
    conversation = Conversation(model)
    conversation.ask("once upon a time there was", **GREEDY)
    seen: list[str] = []

    def press(piece: str) -> None:
        seen.append(piece)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("and then", on_text=press, **GREEDY)
    assert model._last is not None
    before = model._last.times.kept_tokens + model._last.times.prompt_tokens
    asked = [*conversation.messages, {"role": "user", "content": "go on"}]
    wanted = scratch(model, model.encode_chat(asked))
    assert conversation.ask("go on", **GREEDY) == wanted
    assert model._last.times.kept_tokens >= before


def test_conversations_on_a_device(tiny_model: Path) -> None:
    """A device's cache is kept like the CPU's: each turn computes its own tokens."""
    model = HybridModel.from_pretrained(
        tiny_model, experts="f32", device="emulated", vram="700MiB", threads=1, dtype="float32"
    )
    assert model.placement is not None
    assert model.placement.executor is not None
    model.tokenizer.chat_template = TEMPLATE
    conversation, asked = Conversation(model), 0
    for text in ("one", "two", "three"):
        messages = [*conversation.messages, {"role": "user", "content": text}]
        wanted = scratch(model, model.encode_chat(messages))
        assert conversation.ask(text, **GREEDY) == wanted
        assert model._last is not None
        times = model._last.times
        assert times.kept_tokens >= asked
        asked = times.kept_tokens + times.prompt_tokens
    model.close()
