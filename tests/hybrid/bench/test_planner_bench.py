"""What ``hybrid bench planner`` reports: every part is there, and no figure contradicts another."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hybrid.bench.planner import SHARES, planner_table, run_planner_bench
from planner.errors import TraceError


@pytest.fixture
def trace(tmp_path):
    """A small trace with favourites: 60 tokens, 2 layers, 2 of 8 experts."""
    rng = np.random.default_rng(0)
    taste = rng.gumbel(size=(60, 2, 8)) + np.linspace(0, 3, 8)
    ids = np.argsort(-taste, axis=-1)[..., :2].astype(np.uint8)
    path = tmp_path / "small.npz"
    np.savez(path, expert_ids=ids, routing_weights=np.full(ids.shape, 0.5, np.float16))
    return path


def test_the_record_is_complete_and_consistent(trace):
    """Times, gaps and hit rates are all there; nothing beats Belady or its own bound."""
    seen = []
    result = run_planner_bench([trace], repeat=3, instances=2, progress=seen.append)
    assert json.loads(json.dumps(result)) == result
    assert all(len(row["samples_s"]) == 3 for row in result["decisions"])
    assert [row["ahead"] for row in result["steps"]] == [0, 3]
    assert all(len(row["samples_s"]) == 48 for row in result["steps"])
    assert [row["experts"] for row in result["gaps"]] == [8, 16, 32, 64, 128]
    for row in result["gaps"]:
        assert 0 <= row["gap_mean"] <= row["gap_max"]
        assert row["best_baseline_over_ours_mean"] >= 1
    for share in SHARES:
        rows = [row for row in result["caches"] if row["share"] == share]
        always = {row["policy"] for row in rows if row["admission"] == "always"}
        assert always == {
            "belady",
            "sch",
            "lru",
            "lfu",
            "arc",
            "static",
            "mrs",
            "blend",
            "forecast",
        }
        equal = [row for row in rows if row["capacities"] == "equal"]
        assert max(row["of_belady"] for row in equal) == 1.0
    assert any("forecast" in text for text in seen)
    text = planner_table(result)
    assert "decode, from the table" in text
    assert "place and fill" in text
    assert text.count("small.npz") == len(result["caches"])


def test_tokens_cut_the_trace(trace):
    """Only the first tokens are replayed, and the record says how many."""
    result = run_planner_bench([trace], tokens=20, repeat=3, instances=1)
    assert {row["tokens"] for row in result["caches"]} == {20}


def test_without_traces_there_are_no_caches():
    """Hit rates need a trace; without one that part is empty, not invented."""
    result = run_planner_bench(repeat=3, instances=1)
    assert result["caches"] == []
    assert "of Belady" not in planner_table(result)


def test_a_damaged_trace_stops_the_bench_before_it_measures(tmp_path):
    """A cut file is named at once."""
    path = tmp_path / "cut.npz"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(TraceError, match=r"cut\.npz"):
        run_planner_bench([path], progress=lambda text: pytest.fail("it began to measure"))
