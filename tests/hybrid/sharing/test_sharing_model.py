"""A model on an emulated device: the same text as on the CPU, and a report that says how."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.session.model import HybridModel
from hybrid.weights.store import ExpertStore
from planner.decide.policies import DEFAULT_POLICY
from rounding import last_place
from shared_demo import GREEDY, PROMPT, device_of, placed, placement_of

#: Of the largest logit, in float32. Sums that are rounded apart may move activations of later
#: layers by one of their 127 steps.
TOLERANCE = 5e-3
#: In bfloat16: the hidden state may be rounded to its neighbour, and then the logit to its own.
UNITS = 2


@pytest.fixture(scope="module", autouse=True)
def kernels_compute_all() -> Iterator[None]:
    """Whatever a measurement of this machine finds faster; bfloat16 products round otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrid.packed.first_measure._kept", lambda fmt, threads: None)
        yield


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def alone(request: pytest.FixtureRequest) -> HybridModel:
    """The demo on the CPU alone, its dense layers in either type."""
    return HybridModel.from_pretrained(threads=1, dtype=request.param)


@pytest.mark.parametrize("slots", [0, 1, 7, 40, 96])
def test_any_number_of_slots_writes_the_same_text(slots: int, demo_text: str) -> None:
    """The trained model's greedy text does not depend on what is resident where."""
    model = placed("demo", slots)
    executor = placement_of(model).executor
    assert executor is not None
    for _ in range(2):  # the cache lives on between the calls
        assert model.generate(PROMPT, **GREEDY) == demo_text
    executor.residents.settle(5.0)
    executor.residents.check_integrity()
    assert executor.slot_count == min(slots, 96)


@pytest.mark.parametrize(
    ("prompt", "slots"),
    [(PROMPT * 4, 30), ("class Shape:\n    def area(self) -> float:\n", 7), ("import os\n", 96)],
)
def test_logits_agree_to_rounding(alone: HybridModel, prompt: str, slots: int) -> None:
    """Whatever is resident, logits of a prompt are those of the CPU alone."""
    ids = alone.encode(prompt)
    model = placed("demo", slots, alone.model.dtype)
    with torch.no_grad():
        expected = alone.model(ids).logits.float()
        if alone.model.dtype == torch.bfloat16:
            allowed = UNITS * last_place(expected)
        else:
            allowed = TOLERANCE * float(expected.abs().max())
        for _ in range(3):
            assert float((model.model(ids).logits - expected).abs().max()) <= allowed


def test_the_report_says_what_was_predicted_and_measured(tiny_model: Path) -> None:
    """Every term has both sides; the emulated device is named as a slow path with its remedy."""
    model = placed(tiny_model, 6)
    model.generate("abc", max_new_tokens=9, do_sample=False)
    report = model.report()
    assert "experts can be resident" in str(report.placement)
    names = {(term.phase, term.name) for term in report.terms}
    assert {("decode", "experts"), ("prefill", "attention and router"), ("decode", "link")} <= names
    whole = next(term for term in report.terms if term.name == "a step" and term.phase == "decode")
    assert whole.predicted_s > 0
    assert whole.measured_s is not None
    parts = [t for t in report.terms if t.phase == "decode" and t.name in _TERMS]
    assert sum(t.measured_s or 0 for t in parts) == pytest.approx(whole.measured_s)
    assert 0 <= (report.figures["hit_rate"].value or 0) <= 1
    assert f"kept by the policy {DEFAULT_POLICY}" in str(report)
    assert any("emulated device instead of a GPU" in path.what for path in report.slow_paths)
    values = report.to_dict()
    assert json.loads(json.dumps(values))["terms"][0]["phase"] == "prefill"
    assert "predicted" in str(report)
    executor = placement_of(model).executor
    assert executor is not None
    shares = [t for t in report.layers if (t.phase, t.name) == ("decode", "experts")]
    assert [share.layer for share in shares] == list(range(len(executor.layers)))
    experts = next(t for t in report.terms if (t.phase, t.name) == ("decode", "experts"))
    assert sum(share.measured_s or 0 for share in shares) == pytest.approx(experts.measured_s)
    assert "ms predicted | measured" in str(report)


_TERMS = ("attention and router", "deciding", "experts", "output head", "around the layers")


def test_a_batch_decodes_in_the_decode_phase_and_loading_counts_nothing(tiny_model: Path) -> None:
    """Several sequences' tokens are no prompt; the warm-up is nobody's session."""
    model = placed(tiny_model, 6)
    executor = placement_of(model).executor
    assert executor is not None
    assert executor.usage.tokens == 0
    model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4, do_sample=False)
    phases = executor.timeline.phases
    assert (phases["prefill"].steps, phases["decode"].steps) == (1, 3)
    assert executor.usage.tokens == 2 * (3 + 3)


def test_a_closed_device_leaves_a_working_model(demo_text: str) -> None:
    """close() gives the device's memory back; the experts go on on the CPU."""
    model = placed("demo", 20)
    device = device_of(model)
    model.close()
    assert device.memory().free_bytes == device.memory().total_bytes
    assert model.generate(PROMPT, **GREEDY) == demo_text
    assert "given up" in str(model.report().placement)


def test_two_threads_write_what_one_writes(demo_text: str) -> None:
    """Calls from two threads take turns."""
    model = placed("demo", 20)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(model.generate(PROMPT, **GREEDY)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [demo_text, demo_text]


def test_experts_beyond_memory_are_read_ahead(
    monkeypatch: pytest.MonkeyPatch, demo_text: str
) -> None:
    """With less RAM than experts the lookahead asks the system for pages; the text is the same."""
    asked: list[tuple[int, list[int]]] = []
    original = ExpertStore.read_ahead

    def read_ahead(self: ExpertStore, layer: int, experts: Any) -> None:
        asked.append((layer, list(experts)))
        original(self, layer, experts)

    monkeypatch.setattr(ExpertStore, "read_ahead", read_ahead)
    model = placed("demo", 20, ram=(2 << 30) + (1 << 20))
    assert placement_of(model).fit.in_ram < 1
    asked.clear()
    assert model.generate(PROMPT, **GREEDY) == demo_text
    assert {layer for layer, _ in asked} == {1, 2, 3, 4, 5}
    assert any(experts for _, experts in asked)
