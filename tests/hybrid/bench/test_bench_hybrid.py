"""``hybrid bench hybrid`` on a tiny shape: emulated, and with a GPU or what stands for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_cuda import FakeRuntime
from gpu_experts.backends import BACKENDS
from gpu_experts.cuda import CUDA
from gpu_experts.cuda import device as cuda
from hybrid.bench import hybrid as bench
from hybrid.bench.sharing import RULES, Scene
from hybrid.bench.stages import Emulated
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.machine import host
from planner.cost.cost import CostModel
from planner.decide.popularity import Popularity
from planner.foretell.routing import synthetic
from planner_examples import machine, small_model

GPU = pytest.mark.gpu


def run(spec: Path, device: str, **options: Any) -> dict[str, Any]:
    """One case with all rules, on one thread."""
    said: list[str] = []
    result = bench.run(
        [str(spec)],
        device=device,
        shares=[0.5],
        prompts=[4],
        tokens=3,
        repeat=1,
        threads=1,
        progress=said.append,
        **options,
    )
    return result | {"said": said}


def check(result: dict[str, Any], moe_layers: int) -> None:
    """Every rule ran, was timed, and had half of the experts resident."""
    rows = result["results"]
    assert [row["rule"] for row in rows] == [rule.name for rule in RULES]
    for row in rows:
        assert (row["moe_layers"], row["slots"]) == (moe_layers, moe_layers * 4)
        assert len(row["prefill"]["samples_s"]) == len(row["decode"]["samples_s"]) == 1
        assert min(row["prefill"]["seconds_median"], row["decode"]["seconds_median"]) > 0
        assert 0 <= row["hit_rate"] <= 1
    *rules, most = result["summary"]
    assert [row["rule"] for row in rules] == [rule.name for rule in RULES]
    static = next(row for row in rows if row["rule"] == bench.BASELINE)
    terms = static["decode_terms_s"]
    around_s = sum(terms[name]["predicted"] for name in ("attention and router", "output head"))
    assert static["decode_least_s"] > around_s
    assert most["decode_speedup"] > 0


def check_gpu(result: dict[str, Any]) -> None:
    """What is recorded of a GPU, and what was said meanwhile."""
    assert set(result["device"]) == {"name", "memory_bytes", "driver", "torch", "cuda", "triton"}
    assert "emulated" not in result
    said = result["said"]
    measured = next(at for at, text in enumerate(said) if text.startswith("measuring "))
    written = next(at for at, text in enumerate(said) if "random weights, " in text)
    assert measured < written
    assert said[-1].endswith("round 2 of 2"), "the first round is not counted"


def test_an_emulated_device(shared_spec: Path) -> None:
    """The described machine's GPU, this machine's CPU, and a table that says so."""
    result = run(shared_spec, "rtx4060-laptop-8gb", layers=2)
    check(result, 2)
    assert result["emulated"] == "rtx4060-laptop-8gb"
    assert "device" not in result
    table = bench.hybrid_table(result)
    assert table.startswith("emulated: rtx4060-laptop-8gb; 1 threads")
    assert table.count("static split") == 2


def test_a_gpu_by_its_stand_in(shared_spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own layers run, every expert call takes part; a calibration comes first.

    The stand-in computes on the CPU at once: streams, the model's dtype and speed are not tested.
    """
    runtime = FakeRuntime(total_bytes=4 << 30)
    monkeypatch.setattr(cuda, "CudaRuntime", lambda index: runtime)
    monkeypatch.setitem(BACKENDS, "cuda", replace(CUDA, count=lambda: 1))
    result = run(shared_spec, "cuda")
    check(result, 3)
    check_gpu(result)
    assert result["device"]["name"] == runtime.name
    table = bench.hybrid_table(result)
    assert table.startswith(f"{runtime.name}, 4.0 GiB, no driver, ")
    on_demand = next(row for row in result["results"] if row["rule"] == "on demand")
    assert on_demand["decode_terms_s"]["gpu"]["measured"] > 0
    again = run(shared_spec, "cuda")
    assert not any(text.startswith("measuring ") for text in again["said"])


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu(shared_spec: Path) -> None:
    """The same on the real one."""
    result = run(shared_spec, "cuda")
    check(result, 3)
    check_gpu(result)
    assert result["device"]["memory_bytes"] > 1 << 30
    assert result["device"]["cuda"]


def test_without_a_gpu_there_is_one_clear_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, before anything is measured, whichever GPU is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:1"):
        assert main(["bench", "hybrid", "--device", device]) == 2
        told = capsys.readouterr().err
        assert f"device {device} is asked for, torch finds 0 CUDA devices" in told
        assert "hint:" in told


def test_devices_that_are_none_are_refused(
    shared_spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is neither cuda nor a machine, and a machine without a GPU."""
    monkeypatch.setattr(bench, "hardware_for", lambda *_, **__: machine())
    with pytest.raises(UsageError, match="unknown hardware 'cdua'"):
        run(shared_spec, "cdua")
    with pytest.raises(UsageError, match="has no GPU to emulate"):
        run(shared_spec, "cpu-only-laptop")


def test_layers_fit_both_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as RAM has room for, and as the GPU has for slots and dense weights."""
    model, spec = small_model(), machine()
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 1 << 40)
    assert bench._layers_that_fit(model, spec) == bench._layers_that_fit(model, spec, 0.5) == 6
    cost = CostModel(model, spec, "q4_0")
    layer = cost.experts.bytes * 16
    monkeypatch.setattr(host, "available_memory_bytes", lambda: int(layer * 2.5 / 0.6))
    assert bench._layers_that_fit(model, spec, 0.5) == 2
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 1 << 40)
    around = 4 * model.head_params + 2 * cost.experts.bytes
    dense = 2 * (model.layers[0].mixer.params + model.layers[0].ffn_params)
    vram = (around + 3.5 * (0.5 * layer + dense)) / 0.8
    assert bench._layers_that_fit(model, spec.with_values("gpu", vram_bytes=vram), 0.5) == 3
    with pytest.raises(UsageError, match="of the GPU's memory are free for it"):
        bench._layers_that_fit(model, spec.with_values("gpu", vram_bytes=around), 0.5)
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 0)
    with pytest.raises(UsageError, match=r"0\.00 GiB of memory are free for it"):
        bench._layers_that_fit(model, spec)


def test_a_prompts_ids_have_the_routings_loads() -> None:
    """One row a token, its experts distinct, whatever rounding left of the loads."""
    model = small_model(num_hidden_layers=1)
    stage = Emulated(CostModel(model, machine(), "q4_0"))
    routing = synthetic(model, 300, 1)
    assert routing.prompt.sum() != 1200, "the loads of a long prompt are rounded"
    known = Popularity("small", 1, np.ones((1, 16), np.int64))
    ids = Scene(stage, 300, routing, known, 1).prompt_ids(0)
    assert ids.shape == (300, 4)
    loads = np.bincount(ids.ravel(), minlength=17)
    assert abs(loads[:16] - routing.prompt[0]).sum() <= 16
    for row in ids:
        inside = row[row < 16]
        assert len(set(inside.tolist())) == len(inside)
