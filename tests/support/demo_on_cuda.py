"""The demo model on a CUDA device or what stands for one, and how far its logits may be off."""

from __future__ import annotations

from typing import Any

import torch

from gpu_experts.cuda.device import CudaDevice
from hybrid.ask.names import find_hardware
from hybrid.demo import demo_path
from hybrid.loading import load_fast_model
from hybrid.model import Model
from hybrid.sharing.budget import Budget
from hybrid.sharing.placement import Placement, place_model
from planner.foretell.memory import STAGING
from shared_demo import dense_bytes

#: On the CPU activations are rounded to int8 in groups of 32, on a GPU they are not: 0.2 to 1.2 %
#: of the logits' size over the stand-in.
ROUNDING = 0.04


def demo() -> Any:
    """The demo model in transformers' code, in float32."""
    return load_fast_model(demo_path(), fast=False, dtype=torch.float32)[0]


def placed(target: CudaDevice, slots: int) -> tuple[Any, Placement]:
    """The demo model on a device with room for ``slots`` resident experts."""
    model = demo()
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    vram = dense_bytes(demo()) + (slots + STAGING) * layer.blocks.shape[1]
    hardware = find_hardware("rtx4060-laptop-8gb")
    assert hardware.gpu is not None
    vram += int(hardware.gpu.reserve_bytes.value)
    placement = place_model(Model(model), target, hardware, Budget(vram, None, 256), threads=1)
    assert placement.executor is not None
    assert placement.executor.slot_count == slots
    return model, placement


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


def prompts(count: int) -> list[torch.Tensor]:
    """Prompts of different lengths, single tokens among them."""
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 2048, (1, [1, 33, 5, 120][at % 4]), generator=draw) for at in range(count)
    ]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
