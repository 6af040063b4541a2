"""How whole steps' times become parts, on steps whose parts are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybrid.measure.replica import ROWS, shortened
from hybrid.measure.terms_of_step import (
    Pass,
    extra,
    in_modules,
    single_tokens,
    totals,
    typical,
)
from planner.cost.step_times import StepTimes
from planner.describe.families import from_hf_config
from planner.describe.model import ModelSpec
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER, SAMPLING
from planner_examples import SMALL, small_model

ATTENTION_S, EXPERT_S, SHARED_S, HEAD_S, CALL_S, DENSE_S = 0.5, 0.125, 0.25, 2.0, 1.0, 4.0


def by_term(parts: Any) -> dict[tuple[str, int, int], tuple[float, ...]]:
    """Samples by term, weights and context."""
    return {(part.term, part.params, part.context): part.samples for part in parts}


def mixed_model() -> ModelSpec:
    """A dense layer before three of experts; their other dense weights differ."""
    return small_model(decoder_sparse_step=1, mlp_only_layers=[0], num_hidden_layers=4)


def test_extras_are_what_a_step_takes_more_around_its_layers() -> None:
    """Layers and head may differ from step to step; a larger vocabulary takes longer."""
    model = small_model()

    def step(around_s: float, layers_s: float) -> Pass:
        layer = {MIXER: layers_s / 2, CPU: layers_s / 2, DENSE: 0.0}
        return Pass(around_s + layers_s + HEAD_S, StepTimes((layer,), {HEAD: HEAD_S}))

    likeliest = [step(CALL_S, 1.0), step(CALL_S, 2.0)]
    turns = [(likeliest, [step(CALL_S + 0.5, 9.0)]), (likeliest, [step(CALL_S - 0.1, 3.0)])]
    part = extra(SAMPLING, model, 4.0, turns)
    assert (part.term, part.params) == (SAMPLING, model.head_params)
    assert part.samples == pytest.approx((2.0, 0.0))


def step_of(model: ModelSpec, around_s: float, attention_s: float = ATTENTION_S) -> Pass:
    """A step of four experts a token, with something around its layers and head."""
    layers = tuple(
        {
            MIXER: attention_s,
            DENSE: SHARED_S if layer.moe else DENSE_S,
            CPU: 4 * EXPERT_S if layer.moe else 0.0,
        }
        for layer in model.layers
    )
    times = StepTimes(layers, {HEAD: HEAD_S})
    return Pass(times.duration_s + around_s, times)


def test_parts_of_timed_modules() -> None:
    """Each by its weights; what is left of a step surrounds the layers."""
    model = mixed_model()
    passes = [step_of(model, CALL_S), step_of(model, 3 * CALL_S)]
    found = by_term(in_modules(model, model.layers, 2.0, passes, 8, 8))
    dense, sparse = model.layers[0], model.layers[1]
    assert found == {
        (MIXER, sparse.mixer.params, 8): (ATTENTION_S,) * 2,
        (DENSE, dense.ffn_params, 8): (DENSE_S,) * 2,
        (DENSE, sparse.ffn_params, 8): (SHARED_S,) * 2,
        (HEAD, model.head_params, 8): (2 * HEAD_S,) * 2,
        (CALL, model.head_params, 8): (CALL_S, 3 * CALL_S),
    }


def test_parts_of_single_tokens() -> None:
    """Attention for each context, everything else over all of them, also of mixed layers."""
    for model in (small_model(), mixed_model()):
        steps = {100: [step_of(model, CALL_S)], 900: [step_of(model, CALL_S, 3.0)] * 2}
        sparse = model.layers[-1]
        expected = {
            (CPU, model.experts.params_each, 1): (EXPERT_S,) * 3,
            (HEAD, model.head_params, 1): (2 * HEAD_S,) * 3,
            (CALL, model.head_params, 1): (CALL_S,) * 3,
            (MIXER, sparse.mixer.params, 100): (ATTENTION_S,),
            (MIXER, sparse.mixer.params, 900): (3.0,) * 2,
            (DENSE, sparse.ffn_params, 1): (SHARED_S,) * 3,
        }
        if not model.layers[0].moe:
            expected[DENSE, model.layers[0].ffn_params, 1] = (DENSE_S,) * 3
        assert by_term(single_tokens(model, model.layers, 2.0, steps)) == expected


@pytest.mark.parametrize("fast", [False, True])
def test_totals_are_those_of_all_layers(fast: bool) -> None:
    """What the parts of a step add up to, by the planner's names: in kernels and in modules."""
    model = mixed_model()
    steps = [step_of(model, CALL_S)]
    if fast:
        parts = list(single_tokens(model, model.layers, 1.0, {100: steps}))
    else:
        parts = list(in_modules(model, model.layers, 1.0, steps, 8, 8))
        single = by_term(in_modules(model, model.layers, 1.0, steps, 1, 8))
        assert single[CPU, model.experts.params_each, 8] == (EXPERT_S,)
    assert totals(model, model.layers, steps, parts) == pytest.approx(
        {
            MIXER: 4 * ATTENTION_S,
            DENSE: DENSE_S + 3 * SHARED_S,
            CPU: 3 * 4 * EXPERT_S,
            HEAD: HEAD_S,
            CALL: CALL_S,
        }
    )


def test_what_is_typical() -> None:
    """The mean, for slower steps are a part of every run, without those that were interrupted."""
    assert typical([1.0, 1.0, 1.0, 1.6]) == pytest.approx(1.15)
    assert typical([1.0, 1.0, 1.0, 2.5]) == 1.0
    assert typical([3.0]) == 3.0
    assert typical([0.0, 0.0, 3.0]) == 1.0


def test_a_replica_has_every_kind_of_layer() -> None:
    """As few layers as show all kinds and read enough, all for a small model; lists are cut too."""
    settings = SMALL | {"num_hidden_layers": 40, "vocab_size": 150_000, "eos_token_id": 149_000}
    few = shortened(settings, from_hf_config(settings, "few"), "q4_0", "bf16")
    assert 2 <= few["num_hidden_layers"] < 40
    assert (few["vocab_size"], few["eos_token_id"]) == (ROWS, None)
    late = settings | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [25],
        "layer_types": ["full_attention"] * 40,
    }
    long = shortened(late, from_hf_config(late, "late"), "q4_0", "bf16")
    assert long["num_hidden_layers"] == len(long["layer_types"]) == 26
    assert long["mlp_only_layers"] == [25]
    small = shortened(SMALL, small_model(), "q4_0", "bf16")
    assert small == SMALL
    wide = replace(small_model(), layers=small_model().layers * 20)
    assert shortened(SMALL, wide, "f32", "f32")["num_hidden_layers"] < 10
