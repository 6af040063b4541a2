"""A tokenizer: loaded, or refused before anything is converted; compared with its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import refused, write_json
from hybrid.errors import CheckpointError
from hybrid.weights.checkpoint import convert
from hybrid.weights.checks import Checkpoint, check_files
from hybrid.weights.tokenizer import check_tokenizer, load_tokenizer


def edit_tokenizer(src: Path, **changes: Any) -> None:
    file = src / "tokenizer_config.json"
    write_json(file, json.loads(file.read_text()) | changes)


def test_tokenizer_of_the_models_own_code(src: Path) -> None:
    """Refused by the name of its code, before anything is converted."""
    code = ["tokenization_kimi.TikTokenTokenizer", None]
    edit_tokenizer(src, auto_map={"AutoTokenizer": code})
    assert check_files(Checkpoint(src)) == []  # tokenizer.json says all
    (src / "tokenizer.json").unlink()
    assert "(tokenization_kimi.TikTokenTokenizer), which is not run" in refused(src).message
    with pytest.raises(CheckpointError, match="which is not run"):
        load_tokenizer(src)


def test_unloadable_tokenizer_hinders_a_conversion(src: Path, tmp_path: Path) -> None:
    """What only transformers can tell comes before the first byte, too."""
    edit_tokenizer(src, extra_special_tokens=3)
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        convert(src, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("name", ["added_tokens_decoder", "model_specific_special_tokens"])
def test_settings_of_another_version(src: Path, name: str) -> None:
    """Lists where this version takes tables are refused by name; null is nothing."""
    edit_tokenizer(src, **{name: [{"content": "<a>"}]})
    assert f"{name} is a list, transformers takes a table" in refused(src).message
    edit_tokenizer(src, **{name: None})
    assert check_files(Checkpoint(src)) == []


def test_tokenizer_and_embedding(src: Path) -> None:
    """A vocabulary beyond the embedding is of another model; an added token beyond it is told."""
    assert list(check_tokenizer(Checkpoint(src), 256)) == []
    with pytest.raises(CheckpointError, match="has 256 tokens, the model's embedding 200"):
        list(check_tokenizer(Checkpoint(src), 200))
    edit_tokenizer(src, extra_special_tokens={"image_token": "<image>"})
    (note,) = check_tokenizer(Checkpoint(src), 256)
    assert note.startswith("the tokenizer gives <image> ids beyond the model's 256 tokens")


def test_tokens_of_the_template(src: Path) -> None:
    """A template's own tokens are one token each, or that is told."""
    edit_tokenizer(src, chat_template="<|im_start|>{{ messages[0].content }}")
    (note,) = check_tokenizer(Checkpoint(src), 512)
    assert "the chat template writes <|im_start|>, which the tokenizer takes for 12 tokens" in note
    edit_tokenizer(src, extra_special_tokens={"start": "<|im_start|>"})
    assert list(check_tokenizer(Checkpoint(src), 512)) == []


def test_no_tokenizer(src: Path, tmp_path: Path) -> None:
    """A conversion needs none, and says so."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (src / name).unlink()
    told: list[str] = []
    convert(src, tmp_path / "dst", tell=told.append)
    assert told == ["there is no tokenizer: texts need one beside the weights, token ids do not"]
