"""Predictions of a run on the CPU, and how far measurements are from them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid.prediction import predict, prompt_loads
from planner.cost import CostModel
from planner.hardware import Point, TermPoint
from planner.outcome import CALL, CPU, HEAD, MIXER
from planner_examples import bare_machine, machine, small_model

FORMATS = {"experts": "q4_0", "dense": "bf16"}


def test_a_prediction_is_the_planners() -> None:
    """Terms are those of the cost model, layer by layer, whatever GPU the machine has."""
    model = small_model()
    cost = CostModel(model, bare_machine(), "q4_0", "bf16")
    found = predict(model, machine(), **FORMATS, prompt=16, tokens=3)
    assert found == predict(model, bare_machine(), **FORMATS, prompt=16, tokens=3)
    mixer_s = cost.mixer(model.layers[0], 16, 16).value
    assert found.prompt[MIXER].value == pytest.approx(6 * mixer_s)
    assert found.token[CPU].value == pytest.approx(6 * cost.experts.cpu_set_s([1] * 4))
    assert found.token[HEAD] == cost.head(1)
    assert found.tpot.value == pytest.approx(sum(e.value for e in found.token.values()))
    assert found.ttft.value == pytest.approx(sum(e.value for e in found.prompt.values()))
    assert predict(model, machine(), **FORMATS, prompt=16, tokens=1).token == {}


def test_known_loads_replace_the_made_up_ones() -> None:
    """The prompt's experts cost what the router chose: all tokens to four, or spread evenly."""
    model = small_model()
    cost = CostModel(model, bare_machine(), "q4_0", "bf16")
    for loads in ([16] * 4 + [0] * 12, [4] * 16):
        found = predict(model, bare_machine(), **FORMATS, prompt=16, tokens=1, loads=[loads] * 6)
        expected = cost.experts.cpu_set_s([load for load in loads if load])
        assert found.prompt[CPU].value == pytest.approx(6 * expected)


def test_a_calibrated_machine_predicts_what_it_measured() -> None:
    """Parts of a layer add up over the layers; a call's own time is a term of its own."""
    model = small_model()
    layer, experts = model.layers[0], model.experts
    about = {"family": "qwen3_moe", "format": "bf16", "tokens": 1, "context": 1, "error": 0.01}
    points = tuple(
        TermPoint(**{**about, "term": term, "params": params, "seconds": seconds, **more})
        for term, params, seconds, more in (
            ("attention", layer.mixer.params, 1.0, {"kind": "full"}),
            ("feed_forward", layer.ffn_params, 0.0, {"error": None}),
            ("head", model.head_params, 3.0, {}),
            ("call", model.head_params, 4.0, {}),
            ("expert", experts.params_each, 0.5, {"format": "q4_0"}),
        )
    )
    spec = replace(bare_machine(), terms=points)
    found = predict(model, spec, **FORMATS, prompt=2, tokens=2).token
    assert {name: e.value for name, e in found.items() if e.value} == pytest.approx(
        {MIXER: 6.0, CPU: 6 * 4 * 0.5, HEAD: 3.0, CALL: 4.0}
    )


def test_points_of_experts_count_in_prompts() -> None:
    """Loads between two points cost what lies between them."""
    model = small_model()
    shape = {"hidden": 1024, "intermediate": 512, "format": "q4_0"}
    points = tuple(
        Point(lane="cpu", load=load, seconds=seconds, **shape)
        for load, seconds in ((1, 1.0), (9, 9.0))
    )
    spec = replace(bare_machine(), points=points)
    loads = [[5] * 16] * 6
    found = predict(model, spec, **FORMATS, prompt=20, tokens=1, loads=loads)
    assert found.prompt[CPU].value == pytest.approx(6 * (16 * 5.0 + 1e-5))


def test_loads_are_noted_of_the_prompt_only() -> None:
    """One row a layer and piece, ids of no expert left out; afterwards nothing is noted."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hybrid_experts = SimpleNamespace(blocks=range(3))

        def forward(self, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden

    layers = torch.nn.ModuleList([Experts(), Experts()])
    first = torch.tensor([[0, 2], [2, 3]])
    with prompt_loads(layers, 3) as loads:
        for piece in (first, first[:1], first[1:]):
            layers[0](None, piece, None)
            layers[1](None, top_k_index=piece, top_k_weights=None)
    layers[0](None, first, None)
    assert loads == [[1, 0, 2], [1, 0, 2], [1, 0, 1], [1, 0, 1]]
