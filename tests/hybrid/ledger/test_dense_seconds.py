"""What the executor is told of dense parts is what the cost model says of the layers before it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid.ledger.dense_seconds import DenseSeconds
from planner.cost.cost import CostModel
from planner.describe.hardware import TermPoint
from planner.describe.model import ModelSpec
from planner.describe.terms import DENSE, HEAD, MIXER
from planner_examples import machine, small_model

DENSE_AROUND = {"decoder_sparse_step": 2, "num_hidden_layers": 5}
"""Layers 1 and 3 have experts, 0, 2 and 4 have none."""


def measured(model: ModelSpec) -> CostModel:
    """A machine where a token's attention takes its context in seconds, a prompt's its tokens."""
    moe, dense = (next(x for x in model.layers if x.moe is kind) for kind in (True, False))
    about = {"family": model.family, "format": "bf16", "lane": "gpu"}

    def part(term: str, params: int, tokens: int, context: int, seconds: float) -> TermPoint:
        kind = moe.mixer.kind if term == MIXER else ""
        where = {"tokens": tokens, "context": context, "seconds": seconds}
        return TermPoint(term=term, kind=kind, params=params, **about, **where)

    points = [
        *(part(MIXER, moe.mixer.params, 1, at, at) for at in (64, 512)),
        *(part(MIXER, moe.mixer.params, at, at, at) for at in (2, 512)),
        *(part(DENSE, dense.ffn_params, at, at, 0.5 * at) for at in (1, 2, 512)),
        *(part(DENSE, moe.ffn_params, at, at, 0.25 * at) for at in (1, 2, 512)),
        *(part(HEAD, model.head_params, at, at, 10.0 * at) for at in (1, 2, 512)),
    ]
    return CostModel(model, replace(machine(), terms=tuple(points)))


def test_dense_layers_count_for_the_next_with_experts() -> None:
    """From one layer's end to the next router: all that lies between; the rest is the head's."""
    seconds = DenseSeconds(measured(small_model(**DENSE_AROUND)), 64)
    seconds.at(128)
    assert seconds.mixer(0, 1) == pytest.approx(2 * 128 + 0.5)
    assert seconds.mixer(1, 1) == pytest.approx(2 * 128 + 0.5)
    assert seconds.shared(0, 1) == 0.25
    assert seconds.head(1) == pytest.approx(10.0 + 128 + 0.5)


def test_a_step_is_predicted_for_its_own_length() -> None:
    """Whatever came before it; of several sequences each has its own context."""
    cost = measured(small_model(**DENSE_AROUND))
    seconds = DenseSeconds(cost, 4096)
    seconds.at(100)
    assert seconds.mixer(0, 100) == pytest.approx(2 * 100 + 50)
    assert seconds.head(100) == pytest.approx(1000 + 100 + 50)
    seconds.at(101)
    assert seconds.mixer(0, 1) == pytest.approx(2 * 101 + 0.5)
    seconds.at(101, 4)
    dense, moe = cost.model.layers[:2]
    before_s = cost.mixer(dense, 4, 101, 4).value + cost.ffn(dense, 4).value
    assert seconds.mixer(0, 4) == pytest.approx(before_s + cost.mixer(moe, 4, 101, 4).value)
