"""``hybrid bench perplexity`` on a tiny model: what it adds up, and which code it measures."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hybrid.bench import perplexity
from hybrid.bench.perplexity import Reference, run
from hybrid.cli.bench import bench_app
from hybrid.demo import demo_path
from hybrid.demo.evaluate import windows
from hybrid.errors import DiskSpaceError
from hybrid.fast.decode import FastDecoder
from hybrid.weights.importance import Entry, write_importance
from tiny_model import byte_tokenizer

TEXT = "How many experts does a token need? As many as its router chooses, and no more. " * 4
CONTEXT = 32
SIZES: dict[str, Any] = {"tokens": 96, "decode": 64, "context": CONTEXT, "threads": 1}


def test_results_are_those_of_a_plain_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted is what transformers predicts; what is told of it, a loop of floats."""
    predicted: list[np.ndarray] = []
    real = perplexity.predict

    def kept(*args: Any) -> torch.Tensor:
        predicted.append(real(*args).double().numpy())
        return torch.from_numpy(predicted[-1]).float()

    monkeypatch.setattr(perplexity, "predict", kept)
    result = run(texts={"a": TEXT}, formats=("f32", "q4_0"), dtype="float32", **SIZES)
    rows = windows(AutoTokenizer.from_pretrained(demo_path()), [TEXT], CONTEXT, SIZES["tokens"])
    assert len(rows) == 3
    plain = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    with torch.no_grad():
        own = plain(input_ids=rows).logits.log_softmax(-1).numpy()
    # The kernels' cache is in half precision.
    np.testing.assert_allclose(predicted[:5], [*own, *own[:2]], atol=0.02)
    assert 0.02 < np.abs(predicted[5:8] - own).max() < 2  # formats that are none of f32's
    assert [row["experts"] for row in result["results"]] == ["f32", "f32", "q4_0", "q4_0"]
    assert [row["phase"] for row in result["results"]] == ["prefill", "decode"] * 2
    for found, first in zip(result["results"], (0, 3, 5, 8), strict=True):
        losses, more, divergences, same = [], [], [], []
        count = 3 if found["phase"] == "prefill" else 2
        now = predicted[first : first + count]
        for row, p, q in zip(rows[:count].tolist(), predicted, now, strict=False):
            for at, token in enumerate(row[1:]):
                losses.append(-q[at, token])
                more.append(p[at, token] - q[at, token])
                terms = (math.exp(x) * (x - y) for x, y in zip(p[at], q[at], strict=True))
                divergences.append(sum(terms))
                same.append(p[at].argmax() == q[at].argmax())
        ratio = math.exp(np.mean(more))
        assert found["tokens"] == len(losses) == count * (CONTEXT - 1)
        assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)))
        assert found["ratio"] == pytest.approx(ratio)
        error = ratio * np.std(more, ddof=1) / math.sqrt(len(more))
        assert found["ratio_error"] == pytest.approx(error)
        divergences.sort()
        assert found["divergence"]["mean"] == pytest.approx(np.mean(divergences), abs=1e-6)
        median = divergences[(len(divergences) - 1) // 2]
        assert found["divergence"]["median"] == pytest.approx(median, abs=1e-6)
        highest = np.quantile(divergences, 0.99)
        assert found["divergence"]["p99"] == pytest.approx(highest, abs=1e-6)
        assert found["same_first"] == pytest.approx(np.mean(same))
    assert result["results"][2]["divergence"]["median"] > 1e-4
    assert result["reference"] == "f32"


def test_with_an_importance_matrix(tiny_model: Path, tmp_path: Path) -> None:
    """Other scales than without, and the record says with which; what is exact stays as it is."""
    counts = np.exp(3 * np.random.default_rng(0).standard_normal((8, 64))).astype(np.float32)
    ones = np.ones(8, np.float32)
    entries = {
        f"blk.{layer}.ffn_{part}_exps.weight": Entry(counts, ones)
        for layer in range(2)
        for part in ("gate", "up")
    }
    write_importance(tmp_path / "x.gguf", entries, text="t", chunks=1, chunk=8)
    found = [
        run(
            str(tiny_model),
            texts={"a": TEXT},
            formats=("f32", "q3_k"),
            imatrix=file,
            **SIZES | {"decode": 0},
        )
        for file in (None, tmp_path / "x.gguf")
    ]
    (plain, without), (same, with_it) = (
        [row["perplexity"] for row in result["results"]] for result in found
    )
    assert plain == same
    assert without != with_it
    assert found[0]["imatrix"] is None
    assert len(found[1]["imatrix"]) == 16


def test_both_ways_to_compute_are_measured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are steps of the fast path, as short as here; each token of some is one itself."""
    calls: Counter[str] = Counter()
    for name in ("step", "forward"):
        real = getattr(FastDecoder, name)

        def count(*args: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(FastDecoder, name, count)
    told: list[str] = []
    result = run(
        str(tiny_model),
        texts={"a": TEXT},
        formats=("q8_0",),
        dense=("q8_0",),
        finished=lambda so_far, *lines: told.extend(lines),
        **SIZES,
    )
    names = [(row["experts"], row["dense"], row["phase"]) for row in result["results"]]
    assert names == [
        ("q8_0", dense, phase) for dense in ("as it is", "q8_0") for phase in ("prefill", "decode")
    ]
    assert calls["forward"] == 2 * 2 * CONTEXT
    assert calls["step"] == 2 * 3
    assert all(row["path"].startswith("one-token kernels") for row in result["results"])
    assert not any(row["refused"] for row in result["results"])
    assert [line.split(":")[0] for line in told] == [
        "q8_0, prefill",
        "q8_0, decode",
        "q8_0 with dense q8_0, prefill",
        "q8_0 with dense q8_0, decode",
    ]


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    """A line a result in the table; the record names the texts; nothing stays on the disk."""
    file = tmp_path / "a.txt"
    file.write_text(TEXT * 8)
    words = ["perplexity", str(tiny_model), "--file", str(file), "--formats", "bf16, q4_0"]
    words += ["--tokens", "512", "--decode", "0", "--threads", "1", "--dtype", "float32"]
    done = CliRunner().invoke(bench_app, [*words, "--json"])
    result = json.loads(done.stdout)
    assert result["texts"] == [str(file)]
    assert [row["phase"] for row in result["results"]] == ["prefill", "prefill"]
    assert [row["tokens"] for row in result["results"]] == [511, 511]
    done = CliRunner().invoke(bench_app, words)
    head, _, first, second = done.stdout.splitlines()
    assert head.endswith("computed in float32, windows of 512 tokens; beside bf16 in prefill")
    assert first.split()[0] == "bf16"
    assert "1.0000 ± 0.0000" in first
    assert second.split()[0] == "q4_0"


def test_text_of_a_tokenizer_without_an_end() -> None:
    """Documents follow each other without anything between them."""
    assert byte_tokenizer().eos_token_id is None
    ids = windows(byte_tokenizer(), ["ab", "cd"], 4)
    assert byte_tokenizer().decode(ids[0]) == "abcd"


def test_a_reference_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed and what is free, and what helps, before anything is computed."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(DiskSpaceError, match=r"1\.00 GiB free, .* take 2\.00") as caught:
        Reference(tmp_path / "reference", (8, 512, 1 << 17))
    assert caught.value.hint == "set TMPDIR to a larger disk, or measure fewer tokens"
    assert not [*tmp_path.iterdir()]
