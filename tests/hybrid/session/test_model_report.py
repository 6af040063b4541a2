"""What a HybridModel reports of itself and of what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpu_experts.jit.hostcpu import Processor
from hybrid.ledger import slow_paths
from hybrid.session.model import HybridModel

GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("there", "counted", "dtype", "told"),
    [
        ((), (), torch.float32, ""),
        ((), (), torch.bfloat16, "this processor does not multiply it natively"),
        ((), ("bf16",), torch.bfloat16, "HYBRID_SIMD counts on bf16"),
        ((), ("bf16",), torch.float32, ""),
        (("avx512bf16",), ("bf16",), torch.bfloat16, ""),
        (
            ("avx512bf16", "amx-bf16"),
            (),
            torch.float32,
            "hides those of this processor (amx, bf16)",
        ),
        (("avx512bf16", "amx-bf16"), ("bf16", "amx"), torch.bfloat16, ""),
    ],
)
def test_the_report_says_what_bfloat16_costs(
    there: tuple[str, ...],
    counted: tuple[str, ...],
    dtype: torch.dtype,
    told: str,
    tiny_model: Path,
    bf16_units: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed without units, as if there were some, or without those that there are."""
    model = HybridModel.from_pretrained(tiny_model, dtype=dtype)
    levels = slow_paths.hostcpu.LEVELS
    vectors = levels[slow_paths.simd_level.LEVEL] | levels["avx2"]  # what emulation needs
    monkeypatch.setattr(slow_paths.hostcpu, "host_features", lambda: vectors | set(there))
    monkeypatch.setattr(slow_paths.simd_level, "EMULATED", False)
    bf16_units(*counted)
    found = [path for path in model.report().slow_paths if "bfloat16" in path.what]
    assert [told in path.reason for path in found] == [True] * bool(told)
    assert all(path.remedy for path in found)


def test_the_report_counts_and_names_its_sources(model: HybridModel) -> None:
    """Counts are those of the call, every figure has a source, and JSON can carry it all."""
    model.generate("abcd", max_new_tokens=9, **GREEDY)
    report = model.report()
    assert report.figures["prompt_tokens"].value == 4
    assert report.figures["new_tokens"].value == 9
    assert report.figures["store_bytes"].value == model.model.hybrid_store.index.nbytes
    assert all(figure.source for figure in report.figures.values())
    for name in ("ttft_s", "prompt_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"):
        assert report.figures[name].value > 0
    assert json.loads(json.dumps(report.to_dict()))["figures"]["new_tokens"]["value"] == 9
    assert "measured over 8 steps" in str(report)
    assert "1 (torch and kernels)" in str(report)


def test_the_report_names_slow_paths(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced SIMD level and gating outside the kernels are told, with reason and remedy."""
    level = slow_paths.simd_level.LEVEL
    monkeypatch.setattr(slow_paths.simd_level, "EMULATED", False)
    monkeypatch.setattr(slow_paths.hostcpu, "actual", slow_paths.hostcpu.processor)
    plain = [f"expert kernels at {level}"] if level == "portable" else []
    assert [path.what for path in model.report().slow_paths] == plain
    better = Processor("better", units=slow_paths.hostcpu.processor().units)
    monkeypatch.setattr(slow_paths.hostcpu, "actual", lambda: better)
    experts = model.model.model.layers[0].mlp.experts.hybrid_experts
    monkeypatch.setattr(experts, "own_gating", True)
    told = {path.what: path for path in model.report().slow_paths}
    assert list(told) == [f"expert kernels at {level}", "experts of 1 layers in three steps"]
    assert all(path.reason and path.remedy for path in told.values())
    assert "slow path" in str(model.report())


def test_slow_threads_are_a_slow_path(tiny_model: Path) -> None:
    """Where numba has no OpenMP (here: is told to do without), the report says what to install."""
    code = (
        "import sys; from hybrid.session.model import HybridModel;"
        " print(HybridModel.from_pretrained(sys.argv[1]).report())"
    )
    for layer, told in (("workqueue", True), ("omp", False)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tiny_model)],
            env=os.environ | {"NUMBA_THREADING_LAYER": layer},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("libgomp1" in done.stdout) == told


def test_a_fresh_model_reports_without_a_call(tiny_model: Path) -> None:
    """Before the first call the report says what runs and leaves out what was not measured."""
    report = HybridModel.from_pretrained(tiny_model).report()
    assert "ttft_s" not in report.figures
    assert report.figures["load_s"].value > 0
