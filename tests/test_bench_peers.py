"""``hybrid bench peers`` on a tiny shape, as far as it goes without llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.bench import peers
from hybrid.bench.model import read_spec
from hybrid.bench.peers import Case, long_case, peers_table
from test_bench_model import SPEC


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "tiny.toml"
    path.write_text(SPEC)
    return read_spec(path, 2)[1]


def test_a_long_cache_is_made_once_and_stays(settings: dict[str, Any]) -> None:
    """Two turns of decoding after 40 tokens: no prompt is computed, and none of it is lost."""
    case = long_case(40)
    with peers._ours(settings, "auto", print) as ours:
        assert ours.path.fast
        prompts: list[int] = []
        decoder = ours.model._model.hybrid_fast.decoder
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
        assert ours.model.measure(Case("", 8, 4, decode=False)) > 0
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
    plain = peers._plain(settings)
    with torch.no_grad():
        assert torch.isfinite(plain._model(input_ids=torch.arange(5)[None]).logits).all()
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
