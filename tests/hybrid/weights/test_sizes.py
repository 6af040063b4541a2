"""A config.json whose sizes are not those of its files: refused at once, with both numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import edit_config
from hybrid.cli import main
from hybrid.errors import CheckpointError
from hybrid.session.model import HybridModel
from hybrid.weights.checkpoint import convert

HELD = "the weight files hold"
WRONG: list[tuple[str, Any, str]] = [
    ("num_hidden_layers", 1_000_000, f"num_hidden_layers is 1000000, {HELD} 2"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0, not a whole number of at least 1"),
    ("num_hidden_layers", None, "num_hidden_layers is None, not a whole number"),
    ("num_hidden_layers", [2], "num_hidden_layers is [2], not a whole number"),
    ("vocab_size", 10**9, f"vocab_size is 1000000000, {HELD} 256"),
    ("vocab_size", 200, f"vocab_size is 200, {HELD} 256"),
    ("hidden_size", 10**12, f"hidden_size is 1000000000000, {HELD} 64"),
    ("hidden_size", "64", "hidden_size is '64', not a whole number"),
    ("num_experts_per_tok", 9, "num_experts_per_tok is 9, more than the 8 experts of"),
    ("num_experts_per_tok", 0, "num_experts_per_tok is 0, not a whole number of at least 1"),
]
OF_EXPERTS: list[tuple[str, Any, str]] = [
    ("num_local_experts", 10**6, f"num_local_experts is 1000000, {HELD} 8"),
    ("num_local_experts", -1, "num_local_experts is -1, not a whole number of at least 0"),
]
"""Of these a converted directory has none of the files that tell; its index does."""


@pytest.fixture(scope="module")
def copies(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, and what it is converted to."""
    folder = tmp_path_factory.mktemp("sizes")
    convert(tiny_model, folder / "converted", experts="q8_0")
    return {"checkpoint": tiny_model, "converted": folder / "converted"}


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [("checkpoint", *wrong) for wrong in WRONG + OF_EXPERTS]
    + [("converted", *wrong) for wrong in WRONG],
)
def test_sizes_of_another_model(
    kind: str,
    field: str,
    value: Any,
    words: str,
    copies: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands and calls refuse it before transformers makes anything of it."""
    made = tmp_path / "model"
    shutil.copytree(copies[kind], made)
    edit_config(made, **{field: value})

    def build(*_: Any, **__: Any) -> None:
        pytest.fail("transformers was asked to build it")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", build)
    with pytest.raises(CheckpointError) as caught:
        HybridModel.from_pretrained(made)
    assert words in caught.value.message
    commands = [["run", str(made), "-p", "a"]]
    if kind == "checkpoint":
        commands += [
            ["convert", str(made), str(tmp_path / "to")],
            ["convert", "--check", str(made)],
        ]
    for command in commands:
        assert main(command) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    main(["plan", str(made), "-H", "rtx4060-laptop", "--tokens", "2"])
    told = capsys.readouterr().err
    assert field in told or "top_k 9 exceeds its 8 experts" in told
