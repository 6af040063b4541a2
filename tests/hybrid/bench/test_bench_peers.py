"""``hybrid bench peers`` on a tiny shape, as far as it goes without llama.cpp."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid.bench import peers
from hybrid.bench.cases import Case, long_case
from hybrid.bench.peers import peers_table, run
from hybrid.bench.sides import plain_random
from hybrid.cli import main
from hybrid.weights.checkpoint import convert


def test_a_long_cache_is_made_once_and_stays(settings: dict[str, Any]) -> None:
    """Two turns of decoding after 40 tokens: no prompt is computed, and none of it is lost."""
    case = long_case(40)
    with peers._ours(settings, "auto", print) as ours:
        assert ours.path.fast
        prompts: list[int] = []
        decoder = ours.model.model.hybrid_fast.decoder
        real = decoder.prompt
        decoder.prompt = lambda *a: (prompts.append(1), real(*a))[1]
        assert ours.model.measure(case) > 0
        held = ours.model._held
        assert held is not None
        assert held[1].get_seq_length() == 40
        assert ours.model.measure(case) > 0
        assert ours.model._held is held
        assert held[1].get_seq_length() == 40
        assert not prompts
        assert ours.model.measure(Case("", 40, 4, decode=False)) > 0
        assert prompts == [1]


@pytest.mark.parametrize(
    ("least", "most"), [(1.0, 6.0), (2.5, 3.0), (60.0, 3.0)], ids=["faster", "slower", "faulty"]
)
def test_no_side_is_faster_than_what_bounds_it(least: float, most: float) -> None:
    """Reads slower than a side that reads the same bytes do not bound it: the side does."""

    class Side:
        name = "side"

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def measure(self, case: Case) -> float:
            return self.seconds

        def least_s(self, case: Case, threads: int) -> float:
            return least

    ours: Any = Side(2.0)
    row = peers._compare(ours, Side(6.0), Case("", 1, 1, True), 3, lambda text: None, threads=1)
    assert row["speedup"] == 3.0
    assert row["most_speedup"] == most
    assert row["least_s"]["seconds_median"] == min(least, 2.0)


def test_transformers_side_and_the_table(settings: dict[str, Any]) -> None:
    """transformers' own model computes finite numbers, and both sides stand in the table."""
    plain = plain_random(settings)
    with torch.no_grad():
        assert torch.isfinite(plain.model(input_ids=torch.arange(5)[None]).logits).all()
    case, notes = Case("decode", 6, 4, decode=True), []
    with peers._ours(settings, "auto", notes.append) as ours:
        row = peers._compare(ours.model, plain, case, 3, notes.append, threads=1)
    assert len(row["speedup_samples"]) == len(row["ours"]["samples_s"]) == 3
    assert row["theirs"]["tokens_per_s"] > 0
    assert len(row["least_s"]["samples_s"]) == 3
    assert row["most_speedup"] >= row["speedup"]
    record = {
        "spec": "tiny",
        "layers": 12,
        "format": "q4_0",
        "dtype": "float32",
        "threads": 2,
        "machine": {"simd_level": "avx2"},
        "peers": {plain.name: "transformers 5"},
        "results": [row | {"layers": 2}],
    }
    text = peers_table(record)
    assert "transformers, bfloat16, 2 layers" in text
    assert "q4_0 with float32, 2 threads, avx2" in text
    assert "decode, transformers, bfloat16: pair 3 of 3" in notes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_beside_transformers_alone(
    tiny_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides have its weights and compute in one type; only ours has been converted."""
    sides: dict[str, Any] = {}
    compare = peers._compare

    def watched(ours: Any, peer: Any, *rest: Any) -> Any:
        sides.update(ours=ours.model, theirs=peer.model)
        return compare(ours, peer, *rest)

    monkeypatch.setattr(peers, "_compare", watched)
    monkeypatch.setattr(peers, "Others", lambda: SimpleNamespace(lap=lambda: 0.25))
    told: list[str] = []
    record = run(
        str(tiny_model),
        context=20,
        repeat=2,
        threads=1,
        dtype=dtype,
        finished=lambda so_far, *lines: told.extend(lines),
    )
    names = ["decode", "prefill of 512", "prefill of 32", "decode after 20"]
    assert [row["name"] for row in record["results"]] == names
    assert all(len(row["speedup_samples"]) == 2 for row in record["results"])
    assert [line.split(",")[0] for line in told] == names
    assert sides["ours"].dtype == sides["theirs"].dtype == getattr(torch, dtype)
    assert sides["ours"].hybrid_fast.path.fast
    assert not hasattr(sides["theirs"], "hybrid_fast")
    weight = sides["theirs"].get_input_embeddings().weight
    assert torch.equal(weight, sides["ours"].get_input_embeddings().weight)
    assert record["dtype"] == dtype
    assert record["experts_implementation"] == sides["theirs"].config._experts_implementation
    head, peer, *_, last = peers_table(record).splitlines()
    assert last == "disturbed: other programs used up to 25% of the processors"
    assert head.startswith(f"{tiny_model}, 2 layers, q4_0 with {dtype}, 1 threads")
    assert peer.startswith(f"transformers, {dtype}: transformers 5.")


@pytest.mark.parametrize("bench", ["peers", "perplexity"])
def test_a_converted_directory_is_refused(
    bench: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers alone cannot load it, and it has one format: the checkpoint is asked for."""
    convert(tiny_model, tmp_path / "packed")
    assert main(["bench", bench, str(tmp_path / "packed")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "is converted already: its experts are in q4_0" in error
    assert hint == "hint: name the original checkpoint instead"
