"""A dry run says of a machine what the runtime does there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.ask.names import find_hardware
from hybrid.loading import load_fast_model
from hybrid.machine.calibrations import Identity
from hybrid.model import Model
from hybrid.planning.plan import plan
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import cost_of, fitted_alone
from hybrid.weights.checkpoint import convert
from planner.foretell.report import tables
from shared_demo import placement_of


@pytest.mark.parametrize(
    "given",
    [
        {"vram": "11MiB"},
        {"vram": "12MiB"},
        {"vram": 64 << 20},
        {"vram": "5MiB", "context": 128},
        {"vram": "12MiB", "ram": "2GiB"},
        {"vram": "12MiB", "ram": (2 << 30) + (1 << 20)},
        {"vram": "12MiB", "ram": "2.004GiB"},
    ],
)
def test_the_dry_run_places_as_the_runtime_does(given: dict[str, Any]) -> None:
    """The same arguments give the same slots, host memory, shares and formats; no others are
    needed. What both say of it is the same, too."""
    model = HybridModel.from_pretrained("demo", threads=1, **given)
    placement = placement_of(model)
    dry = plan("demo", threads=1, tokens=1, **given)
    assert dry.fit == placement.fit
    assert placement.executor is not None
    assert placement.executor.slot_count == sum(dry.fit.slots)
    assert (dry.request.dense, dry.request.experts) == (
        placement.cost.dense_format,
        placement.cost.expert_format,
    )
    said = dict(tables(dry)[0].rows)
    assert said["GPU"] in placement.decision[0]
    assert said["RAM"] in placement.decision[1]


@pytest.mark.parametrize("formats", [{"dense": "q8_0"}, {"experts": "q8_0", "dense": "bf16"}])
def test_the_dry_run_takes_a_directorys_formats(
    formats: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    """A converted directory is planned in what it holds, an original in what is asked for."""
    converted = convert(tiny_model, tmp_path / "converted", **formats).path
    given: dict[str, Any] = {"vram": "40MiB", "threads": 1}
    placed = placement_of(HybridModel.from_pretrained(converted, **given))
    assert plan(converted, tokens=1, **given).fit == placed.fit
    assert placed.cost.expert_format == formats.get("experts", "q4_0")


@pytest.mark.parametrize("dense", [None, "q8_0", "q4_0"])
def test_the_dry_run_widens_dense_weights_as_a_gpu_does(
    dense: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """On a GPU they are counted alike, whatever the directory holds or is asked for."""
    converted = convert(tiny_model, tmp_path / "converted", dense=dense).path
    hardware = find_hardware("rtx4060-laptop")
    model, _ = load_fast_model(converted, dtype=torch.bfloat16, fast=False)
    there = cost_of(Model(model), hardware, torch.device("cuda")).dense_format
    for planned in (
        plan(converted, hardware, tokens=1),
        plan(tiny_model, hardware, tokens=1, dense=dense),
    ):
        assert planned.request.cost.dense_format == there
        assert planned.request.dense == (dense or "bf16")


def test_the_dry_run_of_the_cpu_alone_is_the_runtimes(tiny_model: Path) -> None:
    """With vram 0, a machine's memory is shared out as loading does it."""
    given: dict[str, Any] = {"vram": 0, "context": 512, "tokens": 1}
    ram = plan(tiny_model, "cpu-only-laptop", **given).fit.used("ram") - 20_000
    found = plan(tiny_model, "cpu-only-laptop", ram=ram, **given).fit
    assert 0 < found.in_ram < 1
    assert found == fitted_alone(Model(load_fast_model(tiny_model)[0]), ram, 512)


def test_this_machines_memory_is_that_of_an_emulated_run() -> None:
    """Uncalibrated, too: not the described laptop's, whose GPU is emulated."""
    placed = placement_of(HybridModel.from_pretrained("demo", vram="64MiB", threads=1)).fit
    assert placed.ram_bytes == Identity.of_this_machine(1).ram_bytes
