"""Panels where experts are shared with a device: the CPU's take them, as on the CPU alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hybrid.packed.bf16_products
from hybrid.ask.names import find_hardware
from hybrid.bench.stages import Emulated
from hybrid.loading import load_fast_model
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.machine.devices import open_device
from hybrid.machine.machines import emulated_hardware
from hybrid.model import Model
from hybrid.packed.bf16_products import multiplier
from hybrid.packed.experts import compute_on_cpu, experts_of
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import Budget
from hybrid.sharing.executor import Executor
from hybrid.sharing.placement import place_model
from hybrid.weights.checkpoint import convert
from planner.cost.cost import CostModel
from planner.describe.hardware import PANELS, HardwareSpec, Point
from planner_examples import bare_machine
from shared_layers import (
    EXPERTS,
    LAYERS,
    SHAPE,
    SPEC,
    exact,
    random_layers,
    random_step,
    shared_executor,
)

LEAST = 4
#: Of the largest output: as for panels beside the twin, of which the device's experts take none.
TOLERANCE = 0.02


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The experts that panels computed, call by call."""
    calls: list[set[int]] = []
    run_panels = hybrid.packed.bf16_products.run_panels

    def counted(x: Any, expert_ids: Any, *others: Any) -> Any:
        left = run_panels(x, expert_ids, *others)
        calls.append(set(expert_ids[(left != expert_ids) & (expert_ids >= 0)].tolist()))
        return left

    monkeypatch.setattr("hybrid.packed.experts.run_panels", counted)
    return calls


def _executor(slots: int, **options: Any) -> tuple[Executor, list[Any]]:
    layers = [layer._replace(panels_from=LEAST) for layer in random_layers()]
    return shared_executor(layers, slots, **options), layers


def _check(found: torch.Tensor, layer: Any, step: tuple[Any, Any, Any]) -> None:
    """Compare with the CPU alone, by panels and by kernels."""
    for alone in (layer, layer._replace(panels_from=None)):
        wanted = compute_on_cpu(*step, alone)
        atol = TOLERANCE * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("slots", [0, 5, LAYERS * EXPERTS])
def test_prompts_take_them_where_the_cpu_computes(
    slots: int, taken: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the experts that the plan leaves to the CPU, with enough tokens; the same sums."""
    executor, layers = _executor(slots)
    director, wanted = executor.director, []
    place = director.place

    def placed(layer: int, loads: Any, *args: Any, **times: Any) -> Any:
        decision = place(layer, loads, *args, **times)
        cpu, many = set(decision.plan.cpu), {e for e, load in loads if load >= LEAST}
        if cpu:
            wanted.append(cpu & many)
        return decision

    monkeypatch.setattr(director, "place", placed)
    rng = np.random.default_rng(slots)
    for tokens in (2, 9, 16, 40):
        for layer in range(LAYERS):
            step = random_step(rng, tokens)
            found = executor.run_layer(layer, *step)
            ours, taken[:] = list(taken), []
            _check(found, layers[layer], step)
            taken[:] = ours
            assert taken == wanted
    assert any(wanted) or slots == LAYERS * EXPERTS


def test_decode_does_not(taken: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A single token's experts have one token each: nothing is widened."""
    monkeypatch.setattr(
        hybrid.packed.bf16_products._Memory, "panel", lambda *_: pytest.fail("widened")
    )
    executor, _ = _executor(5)
    rng = np.random.default_rng(1)
    for _ in range(20):
        for layer in range(LAYERS):
            executor.run_layer(layer, *random_step(rng, 1))
    assert taken
    assert not any(taken)


def test_they_stay_when_the_device_fails(taken: list[set[int]]) -> None:
    """From then on the layer's sums are those of the CPU alone, bit by bit."""
    executor, layers = _executor(5)
    rng = np.random.default_rng(2)
    exact(executor).fail("compute")
    while executor.device is not None:
        executor.run_layer(0, *random_step(rng, 9))
    taken.clear()
    for layer in range(LAYERS):
        step = random_step(rng, 40)
        assert torch.equal(executor.run_layer(layer, *step), compute_on_cpu(*step, layers[layer]))
    assert all(taken)


@pytest.fixture
def units(bf16_units: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A processor that has them, and a machine without a calibration."""
    bf16_units("amx")
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))


def _measured(hardware: HardwareSpec, shape: Any) -> HardwareSpec:
    """A machine where panels were measured to be the faster from ``LEAST`` tokens on."""
    about = {"hidden": shape.hidden, "intermediate": shape.intermediate, "format": shape.format}
    seconds = {"cpu": (1e-6, 2e-6, 3e-6), PANELS: (3e-6, 2.5e-6, 3e-6)}
    points = tuple(
        Point(lane=lane, load=load, seconds=value, **about)
        for lane, values in seconds.items()
        for load, value in zip((1, 2, LEAST), values, strict=True)
    )
    return replace(hardware, points=points)


@pytest.mark.usefixtures("units")
def test_a_model_on_a_device_takes_them(
    tiny_model: Path, tmp_path: Path, taken: list[set[int]]
) -> None:
    """From the load on that the planner reckons with; the report says it, the logits agree."""
    convert(tiny_model, tmp_path / "model", experts="q8_0")
    kernels = HybridModel.from_pretrained(tmp_path / "model", threads=1)
    spec = _measured(bare_machine(), experts_of(kernels.model)[0].shape)
    calibrations.save(spec, Identity.of_this_machine(1))
    alone = HybridModel.from_pretrained(tmp_path / "model", threads=1)
    shared = HybridModel.from_pretrained(tmp_path / "model", threads=1, vram="1GiB", context=64)
    assert {runner.panels_from for runner in experts_of(shared.model)} == {LEAST}
    told = f"{multiplier()} from {LEAST} tokens on (measured)"
    assert f"experts in prompts   on the CPU {told}" in str(shared.report())
    assert f"experts in prompts   {told}" in str(alone.report())
    prompt = [5, 9, 33, 21, 7, 80, 2, 4, 4, 4, 4, 4, 61, 17, 12, 90]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    taken.clear()
    found = torch.cat(shared.generate(prompt, **options).logits)
    assert any(taken), "the CPU had experts of the prompt"
    for other in (alone, kernels):
        wanted = torch.cat(other.generate(prompt, **options).logits)
        assert float((found[0] - wanted[0]).norm()) < 0.05 * float(wanted[0].norm())


@pytest.mark.usefixtures("units")
def test_who_places_a_model_decides_by_its_own_figures(tiny_model: Path, tmp_path: Path) -> None:
    """The machine that the planner is told of counts, not what was found when loading."""
    convert(tiny_model, tmp_path / "model", experts="q8_0")
    described = find_hardware("rtx4060-laptop-8gb")
    for hardware, wanted in ((described, None), (None, LEAST)):
        network, _ = load_fast_model(tmp_path / "model", fast=False)
        runner = experts_of(network)[0]
        runner.panels_from = 99
        device = open_device("emulated", 1 << 30, 1)
        known = hardware or _measured(described, runner.shape)
        place_model(Model(network), device, known, Budget(None, None, 64), threads=1)
        assert experts_of(network)[0].panels_from == wanted


@pytest.mark.usefixtures("units")
def test_a_bench_takes_them_as_its_planner_reckons() -> None:
    """Beside an emulated GPU this machine's CPU computes as it was measured."""
    like = find_hardware("rtx4060-laptop-8gb")
    for cpu, wanted in ((_measured(bare_machine(), SHAPE), LEAST), (bare_machine(), None)):
        with closing(Emulated(CostModel(SPEC, emulated_hardware(cpu, like), "q4_0"))) as stage:
            assert [layer.panels_from for layer in stage.layers] == [wanted] * LAYERS
