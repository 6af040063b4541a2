"""Drafts in a session: the texts stay, the report says what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.ask.speculate import Speculate
from hybrid.cli import main
from hybrid.session.conversation import Conversation
from hybrid.session.model import HybridModel
from tiny_model import TEMPLATE

PROMPT = "abcabcabcabc"
GREEDY: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}


def _model(directory: Path, asked: Any) -> HybridModel:
    found = HybridModel.from_pretrained(
        directory, threads=1, experts="f32", dtype="float32", speculate=asked
    )
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[Any, HybridModel]:
    return {asked: _model(tiny_model, asked) for asked in ("off", "auto", 4)}


def test_the_report_says_what_came_of_drafts(models: dict[Any, HybridModel]) -> None:
    """Drafted, accepted, how many in a step, and what was gained; off says nothing."""
    texts = {asked: model.generate(PROMPT, **GREEDY) for asked, model in models.items()}
    assert len(set(texts.values())) == 1
    reports = {asked: model.report() for asked, model in models.items()}
    assert reports["off"].speculated is None
    assert "drafts" not in str(reports["off"])
    for asked in ("auto", 4):
        assert reports[asked].to_dict()["speculated"]["asked"] == str(Speculate.of(asked))
    found = reports[4].speculated
    assert found is not None
    assert found.steps > 0
    assert f"{found.accepted} of {found.drafted} drafted tokens accepted" in str(reports[4])
    assert ("gained" in str(found)) == (found.gained_s >= 0)
    assert reports[4].figures["new_tokens"].value == 60


def test_stop_strings_lie_across_drafts(models: dict[Any, HybridModel]) -> None:
    """A text ends before them wherever they begin, and the random numbers go on alike."""
    text = models["off"].generate(PROMPT, **GREEDY)
    for at in range(2, 14):
        ended = {
            asked: model.generate(PROMPT, stop_strings=text[at : at + 3], **GREEDY)
            for asked, model in models.items()
        }
        assert len(set(ended.values())) == 1
    drawn, after = set(), set()
    for model in models.values():
        torch.manual_seed(3)
        options = {"max_new_tokens": 40, "do_sample": True, "top_k": 2, "stop_strings": ["e", "Z"]}
        drawn.add(model.generate(PROMPT, **options))
        after.add(float(torch.rand(1)))
    assert len(drawn) == len(after) == 1


def test_conversations_go_on_after_drafts(models: dict[Any, HybridModel]) -> None:
    """Turn after turn, and after an interrupt, each from the cache of the last one."""
    said: dict[Any, list[str]] = {}
    for asked, model in models.items():
        conversation, seen = Conversation(model), []
        said[asked] = [conversation.ask(PROMPT, **GREEDY)]

        def press(piece: str, seen: list[str] = seen) -> None:
            seen.append(piece)
            if len(seen) == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            conversation.ask(PROMPT, on_text=press, **GREEDY)
        said[asked] += ["".join(seen), conversation.ask(PROMPT, **GREEDY)]
        assert model._last is not None
        assert model._last.times.kept_tokens > 0
    assert said["off"] == said["auto"] == said[4]


def test_a_callback_hears_of_no_prompt_after_the_first_token(
    models: dict[Any, HybridModel],
) -> None:
    """Steps of several tokens are no prompts."""
    told: list[int] = []
    models[4].generate(PROMPT, on_prompt=lambda at: told.append(at.total), **GREEDY)
    assert set(told) <= {len(PROMPT)}


def test_beside_a_device_nothing_is_drafted(tiny_model: Path) -> None:
    """Who asked for drafts is told; who did not is not."""
    for asked in ("auto", "lookup"):
        model = HybridModel.from_pretrained(
            tiny_model, experts="f32", device="emulated", vram="700MiB", threads=1, speculate=asked
        )
        told = [note.what for note in model.notes]
        assert ("no tokens are drafted" in told) == (asked == "lookup")
        model.generate(PROMPT, **GREEDY)
        assert model.report().speculated is None
        model.close()


def test_what_cannot_be_speculated(capsys: pytest.CaptureFixture[str]) -> None:
    """One error that names the option's value and the choices."""
    assert main(["run", "-p", "x", "--speculate", "mtp"]) == 2
    said = capsys.readouterr().err
    assert "speculate is 'mtp'" in said
    assert "choose auto, off, lookup" in said
