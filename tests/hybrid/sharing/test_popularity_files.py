"""Popularity files of other weights and with counts that cannot be are refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from hybrid import plan
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.session.model import HybridModel
from hybrid.weights.cache import converted_copy
from planner.decide.popularity import Popularity, read_popularity
from planner.errors import TraceError
from tiny_model import save_tiny_model

OPTIONS: dict[str, Any] = {"vram": "1GiB", "threads": 1}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def uses(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny model used."""
    file = tmp_path_factory.mktemp("uses") / "uses.json"
    model = HybridModel.from_pretrained(tiny_model, **OPTIONS)
    model.generate("abc", **GREEDY)
    model.save_popularity(file)
    return file


def test_it_is_known_wherever_the_model_lies(
    uses: Path, tiny_model: Path, tmp_path: Path, capfd: Any
) -> None:
    """The same weights in another folder and in another format take the file without a word."""
    moved = tmp_path / "moved"
    copytree(tiny_model, moved)
    model = HybridModel.from_pretrained(moved, experts="q8_0", popularity=uses, **OPTIONS)
    assert "popularity" not in capfd.readouterr().err.replace("popularity is known", "")
    assert model.placement is not None
    assert model.placement.popularity is not None
    assert model.placement.popularity.identity == read_popularity(uses).identity is not None


def test_other_weights_of_the_same_shape_are_refused(
    uses: Path, tmp_path: Path, capfd: Any
) -> None:
    """By loading, the command line and a dry run; the file stays as it is."""
    other = tmp_path / "other"
    save_tiny_model(other, seed=1)
    before = uses.read_bytes()
    with pytest.raises(TraceError, match=r"uses\.json counts experts of .*tiny.*other") as caught:
        HybridModel.from_pretrained(other, popularity=uses, **OPTIONS)
    assert caught.value.hint
    words = ["run", str(other), "-p", "x", "-n", "2", "--vram", "1GiB", "--popularity", str(uses)]
    assert main(words) == 2
    assert "counts experts of" in capfd.readouterr().err
    assert uses.read_bytes() == before
    directory, _ = converted_copy(other, "q4_0", None)
    with pytest.raises(TraceError, match="counts experts of"):
        plan(directory, "rtx4060-laptop", popularity=uses, prompt=8)


def test_a_dry_run_says_what_it_compared(uses: Path, tiny_model: Path, capfd: Any) -> None:
    """Of a converted directory the weights; of a config.json only the shape, which is told."""
    directory, _ = converted_copy(tiny_model, "q4_0", None)
    words = ["--hardware", "rtx4060-laptop", "--popularity", str(uses), "--prompt", "8"]
    assert main(["plan", str(directory), *words]) == 0
    assert "only its shape" not in capfd.readouterr().err
    assert main(["plan", str(directory / "config.json"), *words]) == 0
    assert "only its shape was compared" in capfd.readouterr().err


def test_a_dry_run_takes_a_trace_of_a_converted_model(tiny_model: Path, tmp_path: Path) -> None:
    """A trace names no weights, and is counted whatever directory is planned."""
    model = HybridModel.from_pretrained(tiny_model, record_routing=True, **OPTIONS)
    model.generate("abc", **GREEDY)
    model.save_routing(tmp_path / "r.npz")
    directory, _ = converted_copy(tiny_model, "q4_0", None)
    found = plan(directory, "rtx4060-laptop", popularity=tmp_path / "r.npz", prompt=8)
    assert found.fit.fits


def test_a_file_that_names_no_weights(
    uses: Path, tiny_model: Path, tmp_path: Path, capfd: Any
) -> None:
    """One of an earlier version is taken by its shape, which is told, and named when written."""
    data = json.loads(uses.read_text())
    del data["identity"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data))
    model = HybridModel.from_pretrained(tiny_model, popularity=old, **OPTIONS)
    assert "does not say of which weights" in capfd.readouterr().err
    model.save_popularity(old)
    assert read_popularity(old).identity == read_popularity(uses).identity


def test_a_trace_needs_its_ending(tiny_model: Path, tmp_path: Path) -> None:
    """By any other name it could not be told from a popularity file later."""
    model = HybridModel.from_pretrained(tiny_model, record_routing=True, **OPTIONS)
    model.generate("abc", **GREEDY)
    with pytest.raises(UsageError, match=r"r\.txt: the name of a routing trace ends in \.npz"):
        model.save_routing(tmp_path / "r.txt")
    model.save_routing(tmp_path / "r.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["r.npz"]


@pytest.mark.parametrize(
    "change",
    [
        {"uses": [[1.5, 2.0]]},
        {"uses": [[True, False]]},
        {"uses": [["1", "2"]]},
        {"uses": [[1, None]]},
        {"uses": [[1, 2**70]]},
        {"uses": [1, 2]},
        {"uses": [[1, 9]]},
        {"tokens": 10**30},
        {"tokens": 2.5},
        {"tokens": True},
        {"tokens": "8"},
        {"model": None},
        {"model": ["tiny"]},
        {"identity": 5},
    ],
)
def test_counts_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    """Fractions, truths, texts, more uses than tokens, absurd sizes, names that are no text."""
    file = tmp_path / "uses.json"
    whole = Popularity("tiny", 8, np.array([[1, 8]]), "abc")
    file.write_text(whole.to_json())
    assert read_popularity(file).identity == "abc"
    file.write_text(json.dumps(json.loads(whole.to_json()) | change))
    with pytest.raises(TraceError, match=r"uses\.json is damaged") as caught:
        read_popularity(file)
    assert caught.value.hint
