"""Routing: recorded traces and what a bad one says, the synthetic router and its statistics."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from planner.decide.policies.lru import LRU
from planner.decide.replay import replay
from planner.describe.checked_table import read_table
from planner.describe.estimate import Source
from planner.describe.families import from_table
from planner.describe.model import ModelSpec
from planner.describe.routing_law import RECORDED
from planner.describe.traces import read_trace
from planner.errors import TraceError
from planner.foretell.routing import RECALL, SAMPLED, from_trace, synthetic
from planner_examples import small_model

ROOT = Path(__file__).parents[2]
TRACES = ROOT.parent / "shared" / "traces"


def save(path: Path, tokens: int, layers: int = 6, top_k: int = 4, experts: int = 16) -> Path:
    """A trace of the small model's shape, every token's experts distinct."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :top_k]
    weights = rng.random(ids.shape).astype(np.float16)
    np.savez(path, expert_ids=ids.astype(np.uint8), routing_weights=weights)
    return path


def test_a_trace_is_replayed_as_it_is(tmp_path: Path) -> None:
    """The first tokens are counted as the prompt's loads, the next are decoded in order."""
    path = save(tmp_path / "t.npz", 20)
    ids, weights = read_trace(path)
    routing = from_trace(path, small_model(), prompt=12, tokens=8)
    assert routing.source is Source.MEASURED
    assert "t.npz" in routing.origin
    for layer in range(6):
        counts = np.bincount(ids[:12, layer].ravel(), minlength=16)
        assert routing.prompt[layer].tolist() == counts.tolist()
    assert (routing.decode[:, :, 0] == ids[12:]).all()
    first = routing.choices[1][0]
    assert first.ids == sorted(ids[12, 0].tolist())
    assert first.loads == tuple((expert, 1) for expert in first.ids)
    expected = dict(zip(ids[12, 0].tolist(), weights[12, 0].tolist(), strict=True))
    assert dict(zip(first.ids, first.weights, strict=True)) == pytest.approx(expected)


def test_a_batch_merges_its_sequences(tmp_path: Path) -> None:
    """Loads add up over sequences; a layer's loads are top_k per token."""
    routing = from_trace(save(tmp_path / "t.npz", 40), small_model(), prompt=4, tokens=6, batch=4)
    for step in routing.choices[1:]:
        for choice in step:
            assert sum(load for _, load in choice.loads) == 4 * 4
            assert choice.ids == sorted(set(choice.ids))
    assert (routing.prompt.sum(axis=1) == 4 * 4 * 4).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"layers": 5}, "has 5 MoE layers, small has 6"),
        ({"top_k": 3}, "has 3 experts per token, small has 4"),
        ({"experts": 20}, "names expert 19, small has experts 0 to 15"),
    ],
)
def test_traces_of_another_model_are_refused(
    tmp_path: Path, shape: dict[str, int], words: str
) -> None:
    """Layers, top-k and experts must be the model's; the message gives both values."""
    path = save(tmp_path / "t.npz", 20, **shape)
    with pytest.raises(TraceError) as caught:
        from_trace(path, small_model(), prompt=4, tokens=4)
    assert words in caught.value.message
    assert caught.value.hint


def test_short_and_damaged_traces_are_refused(tmp_path: Path) -> None:
    """Too few tokens, a cut file, a text file, a missing array, wrong shapes, no file."""
    path = save(tmp_path / "t.npz", 20)
    with pytest.raises(TraceError, match="has 20 tokens"):
        from_trace(path, small_model(), prompt=16, tokens=8)
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 30):
        cut = tmp_path / "cut.npz"
        cut.write_bytes(whole[:kept])
        with pytest.raises(TraceError, match="cannot be read"):
            read_trace(cut)
    text = tmp_path / "text.npz"
    text.write_text("not a trace")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(text)
    np.savez(tmp_path / "lacks.npz", expert_ids=np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(TraceError, match="lacks an array"):
        read_trace(tmp_path / "lacks.npz")
    flat = {"expert_ids": np.zeros((2, 3), np.uint8), "routing_weights": np.zeros((2, 3))}
    np.savez(tmp_path / "flat.npz", **flat)
    with pytest.raises(TraceError, match="routing_weights is"):
        read_trace(tmp_path / "flat.npz")
    with pytest.raises(TraceError, match="there is no file"):
        read_trace(tmp_path / "none.npz")


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    """Whatever byte of a trace is damaged, it is read or refused with the trace's error."""
    path = save(tmp_path / "t.npz", 4)
    whole = bytearray(path.read_bytes())
    for at in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(TraceError):
            read_trace(path)


def test_the_synthetic_router_is_deterministic_and_valid() -> None:
    """The same seed gives the same routing; top_k distinct experts each; loads of a long prompt."""
    model = small_model()
    first, again = synthetic(model, 64, 10, seed=3), synthetic(model, 64, 10, seed=3)
    assert (first.decode == again.decode).all()
    assert (first.guess == again.guess).all()
    assert (first.prompt == again.prompt).all()
    assert (synthetic(model, 64, 10, seed=4).decode != first.decode).any()
    assert first.decode.shape == (10, 6, 1, 4)
    assert (np.diff(np.sort(first.decode, axis=-1), axis=-1) > 0).all()
    assert first.weights.sum(axis=-1) == pytest.approx(1.0, abs=1e-5)
    long = synthetic(model, 4 * SAMPLED, 4)
    assert long.prompt.sum(axis=1) == pytest.approx(4 * SAMPLED * 4, rel=0.01)
    assert first.source is Source.ASSUMED


def test_guesses_are_right_as_often_as_stated() -> None:
    """The share of the router's choices named 1, 2, 3 layers early is the stated recall."""
    routing = synthetic(small_model(), 8, 400)
    for guess, recall in zip(routing.guess, RECALL, strict=True):
        found = (guess == routing.decode).mean()
        assert found == pytest.approx(recall + (1 - recall) / 16, abs=0.01)


def test_expectations_follow_the_guess() -> None:
    """What a predictor expects sums to what is activated: of one token, of several, of a prompt."""
    model = small_model()
    one, four = synthetic(model, 8, 20), synthetic(model, 8, 20, batch=4)
    for distance in range(1, len(RECALL) + 1):
        p = one.expected(3, 2, distance)
        named = np.unique(one.guess[distance - 1, 3, 2])
        assert p.max() <= 1.0
        assert set(np.flatnonzero(p > 0.5)) == set(named)
        assert four.expected(3, 2, distance).sum() == pytest.approx(4 * 4, rel=0.2)
        assert one.expected(-1, 2, distance).sum() == pytest.approx(one.prompt[2].sum())


def test_identity_experts_never_load() -> None:
    """Zero-computation experts are routed to but are no work and no cache entries."""
    model = small_model(model_type="longcat_flash", zero_expert_num=16, ffn_hidden_size=2048)
    routing = synthetic(model, 32, 20)
    assert routing.decode.max() >= 16
    for step in routing.choices[1:]:
        for choice in step:
            assert all(expert < 16 for expert in choice.ids)
    assert all(expert < 16 for choice in routing.choices[0] for expert in choice.ids)


def statistics(ids: NDArray[np.int64], experts: int) -> dict[str, float]:
    """What the synthetic router's constants are fitted to."""
    steps, layers, top_k = ids.shape
    used = np.zeros((steps, layers, experts), dtype=bool)
    np.put_along_axis(used, ids, True, axis=2)
    popularity = np.sort(used.mean(axis=0), axis=1)[:, ::-1]
    found = {"quarter": (popularity[:, : experts // 4].sum(1) / popularity.sum(1)).mean()}
    for later in (1, 4, 16):
        found[f"after {later}"] = (used[later:] & used[:-later]).sum(2).mean() / top_k
    for share in (4, 2):
        cache = LRU(layers, experts)
        weights = np.ones(ids.shape)
        found[f"LRU 1/{share}"] = replay(cache, ids, weights, [experts // share] * layers).hit_rate
    return found


def lite() -> ModelSpec:
    path = ROOT / "configs" / "models" / "deepseek-v2-lite.toml"
    return from_table(read_table(path), path.name)


@pytest.mark.skipif(not TRACES.is_dir(), reason="recorded traces are not on this machine")
def test_synthetic_routing_resembles_recorded_routing() -> None:
    """Popularity, reuse and LRU's hit rates lie within a tenth of the mean of two real traces."""
    recorded = [
        statistics(read_trace(path)[0][:1500], 64) for path in sorted(TRACES.glob("esft*.npz"))
    ]
    routing = synthetic(replace(lite(), routing=RECORDED), 1, 1500, seed=1)
    made_up = statistics(routing.decode[:, :, 0], 64)
    for name, value in made_up.items():
        real = np.mean([one[name] for one in recorded])
        assert value == pytest.approx(real, rel=0.1), name


@pytest.mark.skipif(not TRACES.is_dir(), reason="recorded traces are not on this machine")
def test_recorded_traces_are_read() -> None:
    """The traces of DeepSeek-V2-Lite belong to its spec and to no other model."""
    for path in sorted(TRACES.glob("esft*.npz")):
        routing = from_trace(path, lite(), prompt=64, tokens=16)
        assert routing.decode.shape == (16, 26, 1, 6)
        with pytest.raises(TraceError, match="MoE layers"):
            from_trace(path, small_model(), prompt=4, tokens=4)
