"""What is remembered of texts in a file: there after a restart, never taken for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpu_experts.decoder.pages import PAGE
from hybrid.engine.kept_prefixes import KeptPrefixes
from hybrid.engine.together import Together
from hybrid.errors import UsageError
from hybrid.session.model import HybridModel
from tiny_model import save_tiny_model
from together_texts import GREEDY, SIZE, Text, alone, finish, prompt

MUCH = 1 << 30


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> HybridModel:
    return HybridModel.from_pretrained(tiny_model, threads=1, dtype="float32", speculate="off")


def _written(model: HybridModel, *lengths: int) -> Together:
    """A memory in which texts of these lengths were written, the last one last."""
    together = Together(model, 1, SIZE)
    for seed, length in enumerate(lengths):
        finish(together, [Text(together, model, prompt(seed, length, model), 2, **GREEDY)])
    return together


def _kept_tokens(together: Together, model: HybridModel, seed: int, length: int) -> int:
    """How much of a prompt is known; its text is as without."""
    text = Text(together, model, prompt(seed, length, model), 12, **GREEDY)
    finish(together, [text])
    assert text.ids == alone(model, prompt(seed, length, model), 12, **GREEDY)
    return text.generation.times.kept_tokens


def test_a_restart_goes_on_from_what_was_known(tiny: HybridModel, tmp_path: Path) -> None:
    """To the token, in a folder that is made; a part of a page, too."""
    kept = KeptPrefixes(tmp_path / "a" / "b", tiny, MUCH)
    assert "nothing is kept in" in Together(tiny, 1, SIZE).load(kept)
    assert "tokens of texts are kept" in _written(tiny, 3 * PAGE + 9, 40).save(kept)
    again = Together(tiny, 1, SIZE)
    assert f"{3 * PAGE + 10 + 41} tokens of earlier texts are known" in again.load(kept)
    again.check_integrity()
    assert _kept_tokens(again, tiny, 0, 3 * PAGE + 9) == 3 * PAGE + 8
    assert _kept_tokens(again, tiny, 1, 40) == 39


def test_what_was_used_last_is_kept(tiny: HybridModel, tmp_path: Path) -> None:
    """As much as the file may have, and as the memory of the next start."""
    together = _written(tiny, 2 * PAGE - 1, 2 * PAGE - 1, 2 * PAGE - 1)
    assert together._memory is not None
    size = together._memory.many.pages.page_bytes
    kept = KeptPrefixes(tmp_path, tiny, 4 * size)
    together.save(kept)
    assert kept.path.stat().st_size < 5 * size
    again = Together(tiny, 1, SIZE)
    again.load(kept)
    found = [_kept_tokens(again, tiny, seed, 2 * PAGE - 1) for seed in (2, 1, 0)]
    assert found == [2 * PAGE - 2, 2 * PAGE - 2, 0]
    little = Together(tiny, 1, 3 * size)
    assert f"{3 * PAGE} tokens of earlier texts" in little.load(kept)
    little.check_integrity()
    assert _kept_tokens(little, tiny, 5, 70) == 0


def _changed(name: str, content: bytes) -> bytes:
    line, _, pages = content.partition(b"\n")
    header: dict[str, Any] = json.loads(line)
    if name == "form":
        header["form"] = "other"
    elif name == "of":
        header["of"]["weights"] = "other"
    elif name == "layout":
        header["page"][0] = 2 * PAGE
    elif name == "tokens":
        header["nodes"][0][1][0] += 1
    elif name == "a byte":
        pages = pages[:100] + bytes([pages[100] ^ 1]) + pages[101:]
    elif name == "the end":
        pages = pages[:-1]
    elif name == "no line":
        return pages
    return json.dumps(header).encode() + b"\n" + pages


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("form", "no file of prefixes of this version"),
        ("of", "of other weights or settings"),
        ("layout", "laid out otherwise"),
        ("tokens", "its checksum is another"),
        ("a byte", "its checksum is another"),
        ("the end", "its checksum is another"),
        ("no line", "is not used"),
    ],
)
def test_what_is_damaged_is_not_used(
    tiny: HybridModel, tmp_path: Path, name: str, match: str
) -> None:
    """With the reason; texts are as without it, and the memory is free."""
    kept = KeptPrefixes(tmp_path, tiny, MUCH)
    _written(tiny, 100).save(kept)
    kept.path.write_bytes(_changed(name, kept.path.read_bytes()))
    again = Together(tiny, 1, SIZE)
    told = again.load(kept)
    assert "is not used" in told
    assert match in told
    again.check_integrity()
    assert again.remembered == 0
    assert _kept_tokens(again, tiny, 0, 100) == 0


def test_files_are_of_weights_and_settings(tiny: HybridModel, tmp_path: Path) -> None:
    """Other weights, and another type, have files of their own."""
    save_tiny_model(tmp_path / "other", seed=1)
    models = [
        tiny,
        HybridModel.from_pretrained(tmp_path / "other", threads=1, dtype="float32"),
        HybridModel.from_pretrained(tmp_path / "other", threads=1, dtype="bfloat16"),
    ]
    assert len({KeptPrefixes(tmp_path, model, MUCH).path for model in models}) == 3


def test_a_folder_that_cannot_be_is_one_error(tiny: HybridModel, tmp_path: Path) -> None:
    """And a file that cannot be written is told and leaves nothing behind."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--prefix-cache"):
        KeptPrefixes(tmp_path / "file" / "below", tiny, MUCH)
    kept = KeptPrefixes(tmp_path / "there", tiny, MUCH)
    kept.path.mkdir()
    assert "cannot be kept" in _written(tiny, 9).save(kept)
    assert list(kept.path.parent.iterdir()) == [kept.path]
    assert "is not used" in Together(tiny, 1, SIZE).load(kept)
