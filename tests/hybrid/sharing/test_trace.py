"""A recorded trace is what the routers chose, and what the planner reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybrid.sharing.trace
from hybrid.anatomy.survey import replaced_experts
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.loading import load_fast_model
from hybrid.sharing.trace import TraceRecorder
from planner.describe.families import from_hf_config
from planner.describe.traces import read_trace
from planner.foretell.routing import from_trace

LAYERS, TOP_K = 3, 2


def choice(tokens: int, seed: int, experts: int = 9) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(experts, TOP_K, replace=False) for _ in range(tokens)])
    return ids, rng.random((tokens, TOP_K), dtype=np.float32)


def record(recorder: TraceRecorder, tokens: int, seed: int, layers: int = LAYERS) -> list[Any]:
    """One forward; only its first ``layers`` are reached."""
    chosen = [choice(tokens, 100 * seed + layer) for layer in range(layers)]
    for layer, (ids, weights) in enumerate(chosen):
        recorder.learn(layer, ids, weights)
    return chosen


def test_a_trace_comes_back_as_it_was_recorded(tmp_path: Path) -> None:
    """Prompt and tokens in order, layers aligned, sequences where they ended."""
    recorder = TraceRecorder(LAYERS)
    forwards = [record(recorder, 5, 1), record(recorder, 1, 2)]
    recorder.end_sequence()
    recorder.end_sequence()
    forwards.append(record(recorder, 3, 3))
    path = tmp_path / "trace.npz"
    recorder.save(path)
    ids, weights = read_trace(path)
    wanted = np.concatenate([np.stack([i for i, _ in forward], 1) for forward in forwards])
    factors = np.concatenate([np.stack([w for _, w in forward], 1) for forward in forwards])
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(weights, factors, atol=1e-3)
    with np.load(path) as arrays:
        assert arrays["sequence_offsets"].tolist() == [0, 6, 9]
        assert arrays["expert_ids"].dtype == np.uint8
        assert arrays["routing_weights"].dtype == np.float16
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]


def test_a_forward_that_was_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """Rows stay aligned over layers whatever happens in between."""
    recorder = TraceRecorder(LAYERS)
    record(recorder, 2, 1, layers=2)
    whole = record(recorder, 4, 2)
    recorder.learn(2, *choice(1, 3))
    record(recorder, 1, 4, layers=1)
    assert recorder.tokens == 4
    recorder.save(tmp_path / "trace.npz")
    ids, _ = read_trace(tmp_path / "trace.npz")
    np.testing.assert_array_equal(ids, np.stack([i for i, _ in whole], 1))


def test_the_limit_holds_and_is_told(tmp_path: Path) -> None:
    """What does not fit is counted; what does is whole."""
    recorder = TraceRecorder(LAYERS, limit=6)
    forwards = [record(recorder, 4, 1), record(recorder, 4, 2), record(recorder, 1, 3)]
    assert (recorder.tokens, recorder.left_out) == (6, 3)
    recorder.save(tmp_path / "trace.npz")
    ids, _ = read_trace(tmp_path / "trace.npz")
    np.testing.assert_array_equal(ids[4:], np.stack([i[:2] for i, _ in forwards[1]], 1))


def test_many_experts_need_wider_ids(tmp_path: Path) -> None:
    """Ids beyond 255 are kept as they are."""
    recorder = TraceRecorder(1)
    ids = np.array([[3, 511]])
    recorder.learn(0, ids, np.ones((1, 2), np.float32))
    recorder.save(tmp_path / "trace.npz")
    assert read_trace(tmp_path / "trace.npz")[0].tolist() == [[[3, 511]]]


def test_what_cannot_be_recorded_or_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shapes, both numbers, and nothing is overwritten or half written."""
    recorder = TraceRecorder(LAYERS)
    with pytest.raises(UsageError, match="0 tokens were recorded"):
        recorder.save(tmp_path / "trace.npz")
    recorder.learn(0, *choice(2, 1))
    with pytest.raises(UsageError, match=r"layer 1 chose ids \[3, 2\].*\[2, 2\] are expected"):
        recorder.learn(1, *choice(3, 1))
    record(recorder, 2, 1)
    taken = tmp_path / "taken.npz"
    taken.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists"):
        recorder.save(taken)
    with pytest.raises(UsageError, match="cannot write"):
        recorder.save(tmp_path / "absent" / "trace.npz")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hybrid.sharing.trace.np, "savez_compressed", full)
        with pytest.raises(UsageError, match="No space left"):
            recorder.save(taken, overwrite=True)
    assert taken.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.npz"]
    recorder.save(taken, overwrite=True)
    assert len(read_trace(taken)[0]) == 2


def test_the_planner_replays_a_run_of_the_demo_model(tmp_path: Path) -> None:
    """Real ids and weights of a loaded model, through the file, into the simulator's routing."""
    model, _ = load_fast_model(demo_path())
    specs = [m.hybrid_experts.spec for m in model.modules() if hasattr(m, "hybrid_experts")]
    recorder = TraceRecorder(len(specs))

    def experts(layer: int, real: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        recorder.learn(layer, ids.numpy(), weights.float().numpy())
        out: Tensor = real(hidden, ids, weights)
        return out

    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.manual_seed(0))
    with replaced_experts(specs, experts), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    recorder.save(tmp_path / "trace.npz")
    spec = from_hf_config(model.config.to_dict())
    routing = from_trace(tmp_path / "trace.npz", spec, prompt=32, tokens=8)
    chosen = torch.stack([layer.topk(4).indices for layer in logits], 1)
    wanted = [torch.bincount(layer.flatten(), minlength=16) for layer in chosen[:32].unbind(1)]
    np.testing.assert_array_equal(routing.prompt, torch.stack(wanted))
    assert (np.sort(routing.decode[:, :, 0]) == np.sort(chosen[32:].numpy())).all()
    assert routing.weights.sum(-1) == pytest.approx(1.0, abs=1e-2)
