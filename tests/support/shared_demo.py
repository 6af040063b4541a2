"""Models that share their experts with an exact emulated device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpu_experts.emulated.device import EmulatedDevice
from hybrid.ask.names import find_hardware
from hybrid.demo import demo_path
from hybrid.loading import load_fast_model
from hybrid.machine.devices import open_device
from hybrid.model import Model
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import Budget
from hybrid.sharing.placement import Placement, place_model
from planner.foretell.memory import STAGING

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
PROMPT = "def main(argv):\n    "


def placed(
    path: Path | str, slots: int, dtype: torch.dtype | None = None, **options: Any
) -> HybridModel:
    """Load ``path`` with room for ``slots`` resident experts on an exact emulated device."""
    source = demo_path() if path == "demo" else path
    model, _ = load_fast_model(source, fast=False, dtype=dtype)
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    needed = dense_bytes(model) + (slots + STAGING) * layer.blocks.shape[1]
    given: dict[str, Any] = {"vram": needed, "threads": 1, "context": 256, "dtype": dtype}
    return HybridModel.from_pretrained(path, **given | options)


def dense_bytes(model: Any) -> int:
    """What a placement takes besides slots, found by asking for too little."""
    big = open_device("emulated", 2 << 30, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    placement = place_model(Model(model), big, hardware, Budget(None, None, 256), threads=1)
    return sum(
        item.bytes
        for item in placement.fit.items
        if item.place == "vram"
        and not item.name.startswith(("expert slots", "copies on their way"))
    )


def device_of(model: HybridModel) -> EmulatedDevice:
    """Return the device of a model, which is still in use."""
    executor = placement_of(model).executor
    assert executor is not None
    assert isinstance(executor.device, EmulatedDevice)
    return executor.device


def placement_of(model: HybridModel) -> Placement:
    """Return how a model lies on its device."""
    assert model.placement is not None
    return model.placement
