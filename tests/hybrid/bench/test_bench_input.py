"""``hybrid bench``: whatever cannot be measured is refused before anything is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.ask.asked_model import find_model
from hybrid.bench import hybrid as bench
from hybrid.bench import kernels, model, peers, perplexity, planner
from hybrid.bench.model import read_spec
from hybrid.bench.record import check_recordable
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.session.model import HybridModel
from small_bench import write_spec


@pytest.fixture
def missing() -> set[str]:
    """Modules that are not installed."""
    return set()


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, missing: set[str]) -> None:
    """A machine without a GPU on which every measurement fails the test."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("it was measured before everything was checked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "hardware_for", fail)
    monkeypatch.setattr(model, "_calibrate", fail)
    monkeypatch.setattr(model, "_measure", fail)
    monkeypatch.setattr(HybridModel, "from_pretrained", fail)
    monkeypatch.setattr(planner, "_decisions", fail)
    monkeypatch.setattr(kernels, "read_seconds", fail)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in missing else True)
    monkeypatch.setattr(peers, "write_random_model", fail)
    monkeypatch.setattr(peers, "load_fast_model", fail)
    monkeypatch.setattr(perplexity, "convert", fail)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A description of a tiny model."""
    return write_spec(tmp_path, max_position_embeddings=256)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run ``hybrid bench`` with what must end in exit code 2, one line and a hint."""
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    *_, error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "1000"], "--layers is 1000, Tiny has 3 MoE layers"),
        (["--prompts", "0"], "--prompts is 0"),
        (["--prompts", "4,-1"], "--prompts is -1"),
        (["--prompts", "4,many"], "4,many"),
        (
            ["--prompts", "250"],
            "250 and",
        ),
        (["--resident", "2"], "--resident has 2"),
        (["--resident", "0.5,0"], "--resident has 0"),
        (["--resident", "nan"], "--resident has nan"),
        (["--device", "nosuch"], "unknown hardware 'nosuch'"),
        (["--device", "cpu-only-laptop"], "has no GPU"),
        (["--device", "cuda"], "0 CUDA devices"),
        (["--trace", "{folder}/none.npz"], "none.npz"),
        (["--trace", "{folder}/tiny.toml"], "tiny.toml cannot be read as a routing trace"),
        (["--trace", "{folder}/other.npz"], "other.npz has 2 MoE layers, Tiny has 3"),
        (["--model", "nosuch"], "nosuch"),
        (["--threads", "100000"], "100000"),
        (["--threads", "0"], "--threads"),
        (["--repeat", "0"], "--repeat"),
        (["--record", "{folder}/none/a.jsonl"], "none/a.jsonl"),
    ],
)
def test_sharing(
    words: list[str], said: str, spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """``bench hybrid``: numbers, devices, traces, models and files."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ids = np.zeros((2000, 2, 2), np.uint8)
    np.savez(spec.parent / "other.npz", expert_ids=ids, routing_weights=ids.astype(np.float16))
    words = [word.format(folder=spec.parent) for word in words]
    if "--model" not in words:
        words = ["--model", str(spec), "--prompts", "4", *words]
    if said == "250 and":
        said = "make 282 tokens, Tiny was made for 256"
    assert said in refused(capsys, "hybrid", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--spec", "{folder}/none.toml"], "none.toml"),
        (["model", "--spec", "{spec}", "--layers", "4"], "--layers is 4"),
        (["model", "--spec", "{spec}", "--prompt", "250"], "was made for 256"),
        (["model", "--spec", "{yarn}", "--prompt", "1000"], "was made for 1024"),
        (["model", "demo", "--prompt", "100000"], "100064 tokens"),
        (["model", "demo", "--layers", "2"], "--layers 2 is given with demo"),
        (["model", "demo", "--vocabulary", "64"], "--vocabulary 64"),
        (["model", "demo", "--spec", "{spec}"], "either"),
        (["model", "{folder}/none"], "none"),
        (["model", "demo", "--threads", "100000"], "100000"),
        (["model", "demo", "--repeat", "0"], "--repeat"),
        (["peers", "--spec", "{folder}/none.toml"], "none.toml"),
        (["peers", "--spec", "{spec}", "--layers", "4"], "--layers is 4"),
        (["peers", "--spec", "{spec}", "--layers", "3", "--context", "300"], "made for 256"),
        (["peers", "--spec", "{yarn}", "--layers", "3", "--context", "1500"], "made for 1024"),
        (["peers", "--spec", "{spec}", "--threads", "100000"], "100000"),
        (["peers", "--dtype", "float64"], "'float64'"),
        (["peers", "demo", "--layers", "2"], "--layers 2 is given with demo"),
        (["peers", "demo", "--spec", "{spec}"], "either"),
        (["peers", "demo", "--context", "2000"], "demo was made for 1024"),
        (["peers", "{folder}/none"], "none"),
        (["perplexity", "{folder}/none"], "none"),
        (["perplexity", "--file", "{folder}/none.txt"], "none.txt"),
        (["perplexity", "--file", "{spec}"], "fewer than one window of 512"),
        (["perplexity", "--formats", "f32,q3_0"], "'q3_0'"),
        (["perplexity", "--formats", ""], "''"),
        (["perplexity", "--dense", "q3_0"], "'q3_0'"),
        (["perplexity", "--dtype", "float64"], "'float64'"),
        (["perplexity", "--threads", "100000"], "100000"),
        (["model", "--dtype", "float64"], "'float64'"),
        (["lookahead", "--file", "{folder}/none.txt"], "none.txt"),
        (["lookahead", "--threads", "100000"], "100000"),
        (["planner", "--trace", "{folder}/none.npz"], "none.npz"),
        (["planner", "--repeat", "0"], "--repeat"),
        (["kernels", "--threads", "0"], "--threads"),
        (["kernels", "--repeat", "0"], "--repeat"),
    ]
    + [
        ([name, *more, "--record", "{folder}/none/a.jsonl"], "none/a.jsonl")
        for name, more in (
            ("model", ["demo"]),
            ("peers", ["--spec", "{spec}"]),
            ("lookahead", []),
            ("perplexity", []),
            ("planner", []),
            ("kernels", []),
        )
    ],
)
def test_the_others(words: list[str], said: str, spec: Path, capsys: Any) -> None:
    """Files that are not there, numbers that cannot be, options that have no effect."""
    yarn = spec.with_name("yarn.json")  # made for four times what it was trained with
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    settings = read_spec(spec, None)[1]
    yarn.write_text(json.dumps(settings | {"rope_scaling": scaling}))
    given = [word.format(folder=spec.parent, spec=spec, yarn=yarn) for word in words]
    assert said in refused(capsys, *given)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["llama_cpp"], "llama-cpp-python"),
        (["llama_cpp", "gguf"], "llama-cpp-python gguf"),
    ],
)
def test_the_comparison_needs_llama_cpp(
    gone: list[str], said: str, missing: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One error names all that is missing, its hint the command that installs it."""
    missing.update(gone)
    assert main(["bench", "peers"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert all(word in error for word in said.split())
    assert hint == f"hint: pip install {said}"


def test_the_comparison_is_of_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    """Another one is refused by its name, before weights are written."""
    assert "qwen3_moe, the model is olmoe" in refused(capsys, "peers", "--spec", "olmoe")


def test_the_comparison_has_a_shape_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options it is twelve layers of Qwen3-30B-A3B."""

    class WrittenError(Exception):
        pass

    def write(settings: dict[str, Any], *_: Any, **__: Any) -> None:
        raise WrittenError(settings["num_hidden_layers"], settings["hidden_size"])

    monkeypatch.setattr(peers, "write_random_model", write)
    with pytest.raises(WrittenError) as caught:
        main(["bench", "peers"])
    assert caught.value.args == (12, 2048)


def test_a_trace_for_one_of_the_models(spec: Path) -> None:
    """A trace that fits one of several models is no slip: it is used for that one."""
    trace = spec.parent / "mine.npz"
    ids = np.zeros((2000, 3, 2), np.uint8)
    np.savez(trace, expert_ids=ids, routing_weights=ids.astype(np.float16))
    models = [find_model(name, "q4_0").spec for name in ("OLMoE", str(spec))]
    bench._check_trace(trace, models, 4, 32)


def test_checking_a_record_leaves_nothing(tmp_path: Path) -> None:
    """A record that can be written is not made before there is something to write."""
    check_recordable(tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="folder: it is no file"):
        check_recordable(tmp_path / "folder")
    with pytest.raises(UsageError, match="null: it is no file"):
        check_recordable(Path(os.devnull))
