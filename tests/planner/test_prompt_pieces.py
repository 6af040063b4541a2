"""Prompts that the runtime computes in pieces: how they are cut, dealt out and predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybrid.fast.prompt import PIECE, in_pieces
from hybrid.ledger.prediction import predict
from hybrid.measure import calibrate as calibration
from planner.cost.cost import CostModel
from planner.cost.term_points import MeasuredTerms, pieces
from planner.describe.estimate import Estimate, Source
from planner.describe.hardware import HardwareSpec, TermPoint
from planner.describe.terms import CPU, HEAD, MIXER
from planner.foretell.routing import synthetic
from planner_examples import bare_machine, machine, small_model

FORMATS = {"experts": "q4_0", "dense": "bf16"}


def attention(tokens: int, seconds: float, **more: Any) -> TermPoint:
    """What the small model's attention took for a prompt, ten tokens at a time."""
    about = {"family": "qwen3_moe", "kind": "full", "format": "bf16", "error": 0.1, "piece": 10}
    params = small_model().layers[0].mixer.params
    where = {"params": params, "tokens": tokens, "context": tokens, "seconds": seconds}
    return TermPoint(term=MIXER, **{**about, **where, **more})


def in_tens(seconds: float) -> HardwareSpec:
    """A machine where a token takes 0.1 s in a piece, and 0.01 s more for each one before it.

    ``seconds`` is what a prompt of 30 tokens took.
    """
    points = (attention(2, 0.2), attention(10, 1.0), attention(30, seconds))
    return replace(bare_machine(), terms=points)


def test_a_prompt_is_cut_as_the_runtime_cuts_it() -> None:
    """The planner's pieces are those that the runtime computes; 0 is no cutting."""
    import torch

    for tokens in (1, 511, 512, 513, 1024, 1300):
        cut = [place for place, _ in in_pieces(torch.zeros(1, tokens), 1)]
        assert [(p.stop - p.start, p.stop) for p in cut] == pieces(tokens, PIECE)
    assert pieces(7, 0) == [(7, 7)]


def test_what_came_before_a_piece_costs_each_of_its_tokens() -> None:
    """The longest prompt tells how much: 10 x 10 and 10 x 20 pairs took 3 s more than pieces."""
    terms = MeasuredTerms(in_tens(3.0 + 3.0).terms, "qwen3_moe")
    key = (MIXER, "full", small_model().layers[0].mixer.params, "bf16")
    assert terms.piece("bf16") == 10
    assert terms.piece("q8_0") == 0
    assert terms.prompt(*key, 10) == Estimate(1.0, Source.MEASURED, 0.1)
    late = terms.prompt(*key, 6, past=10)
    assert late is not None
    assert (late.source, late.error) == (Source.FITTED, 0.1)
    assert late.value == pytest.approx(0.6 + 60 * 0.01)


def test_without_a_longer_prompt_pieces_tell_how_they_grow() -> None:
    """4 and 10 tokens took 0.1 and 0.16 s each: 0.01 s a token more, 0.02 s for each before."""
    points = (attention(4, 0.4), attention(10, 1.6))
    key = (MIXER, "full", points[0].params, "bf16")
    found = MeasuredTerms(points, "qwen3_moe").prompt(*key, 10, past=10)
    assert found is not None
    assert found.value == pytest.approx(1.6 + 100 * 0.02)
    alone = MeasuredTerms(points[:1], "qwen3_moe").prompt(*key, 4, past=10)
    assert alone == Estimate(0.4, Source.FITTED, 0.1)


def test_a_cost_model_cuts_where_pieces_were_measured() -> None:
    """Not with a GPU, not for several sequences, and not where nothing was measured."""
    model = small_model()
    cost = CostModel(model, in_tens(6.0))
    assert cost.pieces(25) == [(10, 10), (10, 20), (5, 25)]
    assert cost.pieces(25, batch=2) == [(25, 25)]
    assert CostModel(model, bare_machine()).pieces(25) == [(25, 25)]
    with_gpu = replace(machine(), terms=in_tens(6.0).terms)
    assert CostModel(model, with_gpu).pieces(25) == [(25, 25)]


def test_every_piece_reads_its_experts_and_the_head() -> None:
    """The prompt's terms are the sums over its pieces, each with its own experts."""
    model = small_model()
    spec = in_tens(6.0)
    cost = CostModel(model, spec, "q4_0", "bf16")
    of_pieces = ([10] * 4 + [0] * 12, [0] * 4 + [10] * 4 + [0] * 8, [5] * 4 + [0] * 12)
    rows = [loads for loads in of_pieces for _ in range(6)]
    found = predict(model, spec, **FORMATS, prompt=25, tokens=1, loads=rows).prompt
    experts_s = sum(cost.experts.cpu_set_s([n for n in loads if n]) for loads in of_pieces)
    assert found[CPU].value == pytest.approx(6 * experts_s)
    assert found[MIXER].value == pytest.approx(6 * (2.5 + (100 + 100) * 0.01))
    assert found[HEAD].value == pytest.approx(3 * cost.head(1).value)
    # Loads of the whole prompt alone are dealt out to its pieces.
    whole = np.sum(of_pieces, axis=0).tolist()
    dealt = predict(model, spec, **FORMATS, prompt=25, tokens=1, loads=[whole] * 6).prompt
    assert dealt[CPU].value > 6 * cost.experts.cpu_set_s([n for n in whole if n])


def test_dealing_out_keeps_every_token() -> None:
    """Pieces add up to the prompt in every layer, in proportion, and are always the same."""
    routing = synthetic(small_model(), 100, 1)
    sizes = [40, 40, 20]
    parts = routing.in_pieces(sizes)
    for layer, loads in enumerate(routing.prompt):
        total = np.zeros_like(loads)
        for size, part in zip(sizes, parts, strict=True):
            assert part[layer].ids == sorted(part[layer].ids)
            for expert, load in part[layer].loads:
                total[expert] += load
            assert sum(load for _, load in part[layer].loads) == size * 4
        assert total.tolist() == loads.tolist()
    assert parts == synthetic(small_model(), 100, 1).in_pieces(sizes)


def test_the_longest_prompt_that_a_model_can_read_is_measured() -> None:
    """A short context cuts the list off, and its end is measured instead."""
    every = calibration._prompts(None)
    assert tuple(every) == calibration.PROMPTS
    assert calibration._prompts(1 << 20) == every
    short = {prompt: new for prompt, new in every.items() if prompt < 1024}
    assert calibration._prompts(1024) == short | {1023: 1}
    assert calibration._prompts(2049) == every | {2048: 1}
