"""What is measured of layers on a device: the executor's own terms, taken apart exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpu_experts.emulated.device import EmulatedDevice
from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware
from hybrid.machine.devices import open_device
from hybrid.measure import shared as measure_placed
from hybrid.measure.alone import SETTLING
from hybrid.measure.shared import Placed, UnmeasuredError, parts_of
from hybrid.measure.terms_of_step import Part, Pass, Planned
from planner.cost.step_times import StepTimes
from planner.describe.model import ModelSpec
from planner.describe.terms import (
    CALL,
    DECIDING,
    DENSE,
    EXPERTS,
    HANDING,
    HEAD,
    JOINING,
    MIXER,
    SAMPLING,
)
from planner_examples import small_model
from tiny_families import families, tiny_config

ATTENTION_S, DENSE_S, DECIDING_S, EXPERTS_S, HEAD_S, CALL_S = 2.0, 8.0, 0.5, 4.0, 16.0, 32.0
HANDING_S, JOINING_S = 0.125, 1.5


def one_pass(model: ModelSpec) -> Pass:
    """A pass in which every part takes what the constants say, as the executor sees it."""
    layers: list[dict[str, float]] = []
    plans: list[Planned] = []
    before_s = 0.0
    for layer in model.layers:
        if layer.moe:
            copies = len(layers) % 3
            deciding_s = DECIDING_S + HANDING_S * copies
            mixer_s = before_s + ATTENTION_S
            layers.append({MIXER: mixer_s, DECIDING: deciding_s, EXPERTS: EXPERTS_S})
            plans.append(Planned(copies, EXPERTS_S - JOINING_S))
            before_s = 0.0
        else:
            before_s += ATTENTION_S + DENSE_S
    times = StepTimes(tuple(layers), {HEAD: before_s + HEAD_S})
    return Pass(times.duration_s + CALL_S, times, tuple(plans))


def taken_apart(model: ModelSpec) -> dict[tuple[str, int], tuple[float, ...]]:
    beyond = {layer.ffn_params: [0.25, 0.5] for layer in model.layers if layer.moe}
    step = one_pass(model)
    found: list[Part] = [*parts_of(model, model.layers, [step] * 2, 1, 9, beyond, 100.0, 1000.0)]
    assert {(part.tokens, part.context, part.piece) for part in found} == {(1, 9, 0)}
    return {(part.term, part.params): tuple(np.round(part.samples, 9)) for part in found}


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_only_layers": [0]}, {"mlp_only_layers": [0, 1, 4]}, {"mlp_only_layers": [0, 5]}],
)
def test_passes_are_taken_apart(changes: dict[str, Any]) -> None:
    """Wherever dense layers stand, every part has its own time; a larger head's is added."""
    model = small_model(decoder_sparse_step=1, **changes)
    moe = next(layer for layer in model.layers if layer.moe)
    expected = {
        (MIXER, moe.mixer.params): (ATTENTION_S,) * 2,
        (DENSE, moe.ffn_params): (0.25, 0.5),
        (HEAD, model.head_params): (HEAD_S + 100,) * 2,
        (CALL, model.head_params): (CALL_S + 1000,) * 2,
        (DECIDING, model.experts.params_each): (DECIDING_S,) * 2,
        (HANDING, model.experts.params_each): (HANDING_S,) * 2,
        (JOINING, model.experts.params_each): (JOINING_S,) * 2,
    }
    if changes:
        expected[DENSE, model.layers[0].ffn_params] = (DENSE_S,) * 2
    assert taken_apart(model) == expected


@pytest.mark.parametrize(
    ("ends_s", "expected"), [((2.0, 2.0, -50.0), (2.0, 2.0, 0.0)), ((-1.0, -1.0, 9.0), (0.0,) * 3)]
)
def test_a_pass_that_ends_before_its_plan_makes_no_time_negative(
    ends_s: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    """A calibration could not be read again that had one; passes that end early as a rule join at
    once."""
    model = small_model(decoder_sparse_step=1)
    steps = []
    for end_s in ends_s:
        step = one_pass(model)
        plans = tuple(plan._replace(seconds=EXPERTS_S - end_s) for plan in step.plans)
        steps.append(replace(step, plans=plans))
    beyond = {layer.ffn_params: [0.0] for layer in model.layers}
    parts = parts_of(model, model.layers, steps, 1, 9, beyond, 0.0, 0.0)
    (joining,) = [part for part in parts if part.term == JOINING]
    assert joining.samples == expected


def test_where_nothing_tells_layers_apart_they_share_evenly() -> None:
    """Dense layers before every layer with experts: the sum is right, whatever is whose."""
    model = small_model(decoder_sparse_step=2)
    found = taken_apart(model)
    dense, moe = model.layers[0], model.layers[1]
    attention_s, mlp_s = (
        found[MIXER, moe.mixer.params][0],
        found[DENSE, dense.ffn_params][0],
    )
    assert 2 * attention_s + mlp_s == 2 * ATTENTION_S + DENSE_S


def of_tiny(path: Path, context: int = 64) -> Placed:
    """A tiny model, all of it, on an emulated device."""
    device = open_device("emulated", 1 << 30, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    return Placed(path, find_model(path).spec, device, hardware, context, 1)


def test_every_other_generation_begins_with_nothing_resident(tiny_model: Path) -> None:
    """As the first prompt of a session does; the others find what the one before left."""
    placed = of_tiny(tiny_model)
    executor = placed.placement.executor
    assert executor is not None
    emptied: dict[int, list[bool]] = {2: [], 8: []}
    for _ in range(4):  # lengths take turns, too
        for prompt, found in emptied.items():
            before = executor.residents
            placed.generate(prompt, 2)
            found.append(executor.residents is not before)
            executor.residents.check_integrity()
    placed.close()
    assert emptied == {2: [True, False] * 2, 8: [True, False] * 2}


def test_a_model_is_measured_where_it_is_placed(tiny_model: Path) -> None:
    """Half of the experts at most are resident; every term of prompts and tokens is there."""
    placed = of_tiny(tiny_model)
    executor = placed.placement.executor
    assert executor is not None
    device = executor.device
    assert isinstance(device, EmulatedDevice)
    assert executor.slot_count == 8  # of 2 layers of 8
    runs = {prompt: [placed.generate(prompt, new) for _ in range(2)] for prompt, new in PROMPTS}
    assert [len(passes) for passes in runs[8]] == [12, 12]
    for step in runs[8][0]:
        assert min(step.times.terms.values()) >= 0
        assert min(plan.seconds for plan in step.plans) > 0
        assert step.around_s > 0
    parts = [*placed.parts(runs), *placed.extras(4, 1)]
    placed.close()
    assert device.memory().free_bytes == device.memory().total_bytes
    found = {(part.term, part.tokens, part.context) for part in parts}
    terms = (MIXER, DENSE, HEAD, CALL, DECIDING, HANDING, JOINING)
    assert found == {(t, n, c) for t in terms for n, c in ((2, 2), (8, 8), (1, 16))} | {
        (SAMPLING, 1, 1)
    }
    certain = [part for part in parts if part.term in (MIXER, HEAD, CALL)]
    assert all(min(part.samples) > 0 for part in certain)
    decoded = next(part for part in parts if (part.term, part.tokens) == (MIXER, 1))
    assert len(decoded.samples) == 2 * (12 - 1 - SETTLING)


PROMPTS = ((2, 1), (8, 12))


def test_a_device_that_fails_measures_nothing(tiny_model: Path) -> None:
    """Times of layers that the CPU computed in its place would be somebody else's."""
    placed = of_tiny(tiny_model)
    executor = placed.placement.executor
    assert executor is not None
    assert isinstance(executor.device, EmulatedDevice)
    executor.device.fail("memory", after=1)  # slots are opened anew first
    with pytest.raises(UnmeasuredError, match="injected"):
        placed.generate(8, 4)


def test_passes_that_lack_layers_measure_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where nobody noted why."""
    placed = of_tiny(tiny_model)
    nothing = StepTimes((), {HEAD: 1.0})
    monkeypatch.setattr(placed, "_take", lambda whole_s: Pass(whole_s, nothing))
    with pytest.raises(UnmeasuredError, match="told apart"):
        placed.generate(8, 2)
    placed.close()


@pytest.mark.parametrize(("kind", "launched"), [("qwen2_moe", False), ("deepseek_v2", True)])
def test_shared_experts_count_beyond_the_router(
    kind: str, launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the device still computes when the host has the router's answer, as it is launched.

    Where a family computes them before its routed experts, they lie before that answer.
    """
    config_kind, model_kind = families()[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_kind(tiny_config(config_kind)).save_pretrained(tmp_path)
    placed = of_tiny(tmp_path)
    shared = placed.placement.shared
    assert shared is not None
    assert bool(shared.layers) is launched
    calls: list[object] = []

    def lasting(work: Callable[[], object]) -> tuple[float, float]:
        calls.append(work())
        return 1.0, 0.125

    before = placed.generate(3, 2)
    monkeypatch.setattr(placed, "_lasting", lasting)
    # The head of as many tokens as there are takes no more; a larger one would, by `lasting`.
    parts = {(p.term, p.params): p.samples for p in placed.parts({3: [before]}) if p.tokens == 3}
    moe = {layer.ffn_params for layer in placed.layers if layer.moe}
    for params in moe:
        expected = (0.125,) * measure_placed.SAMPLES if launched else (0.0,)
        assert parts[DENSE, params] == expected
    assert calls
    assert placed.generate(3, 2)  # what was launched for measuring is forgotten
    placed.close()


def test_a_larger_head_takes_longer_where_it_is_computed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's own time within the pass; on a device's after it, handing it over is alike."""
    placed = of_tiny(tiny_model)
    monkeypatch.setattr(placed, "_lasting", lambda _: (1.0, 0.25))
    placed.vocab //= 4  # as if the replica had a quarter of the tokens
    assert placed._larger_head() == (3.0, 0.75)
    monkeypatch.setattr(placed, "_device", SimpleNamespace(torch_device=torch.device("cuda")))
    assert placed._larger_head() == (0.0, 0.75)
    placed.close()


def test_what_the_device_cannot_run_is_named(tmp_path: Path) -> None:
    """Experts whose activation the kernels do not know stay on the CPU, and nothing is measured."""
    config_kind, model_kind = families()[OWN_GATING]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_kind(tiny_config(config_kind)).save_pretrained(tmp_path)
    with pytest.raises(UnmeasuredError, match="activation"):
        of_tiny(tmp_path)


OWN_GATING = "inkling2_text"
