"""A few layers of small random experts, and executors that share them with an emulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cpu_experts.ffn import run_experts
from gpu_experts.emulated.device import EmulatedDevice
from hybrid.ask.names import find_hardware
from hybrid.formats.block import Block, pack_expert
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.machine.devices import open_device
from hybrid.sharing.device_guard import TIMEOUT_S, DeviceGuard
from hybrid.sharing.executor import Executor
from planner.cost.cost import CostModel
from planner.decide.cache import ExpertCache
from planner.decide.capacity import equal_capacities
from planner.decide.director import Director
from planner.decide.policies.lru import LRU
from planner.describe.hardware import HardwareSpec
from planner.describe.model import Experts, Layer, Mixer, ModelSpec
from planner.foretell.memory import STAGING

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 3, 8, 3, 64, 32
SHAPE = Block(hidden=HIDDEN, intermediate=INTERMEDIATE, format="q4_0")
_EXPERTS_OF_LAYER = Experts(count=EXPERTS, top_k=TOP_K, hidden=HIDDEN, intermediate=INTERMEDIATE)
SPEC = ModelSpec(
    name="small",
    family="test",
    hidden=HIDDEN,
    vocab=100,
    context=1000,
    tied=False,
    layers=(
        Layer(mixer=Mixer(kind="full", params=1000), ffn_params=500, experts=_EXPERTS_OF_LAYER),
    )
    * LAYERS,
)


class Blocks(NamedTuple):
    """One layer's experts."""

    blocks: np.ndarray
    shape: Block
    panels_from: int | None = None


def random_layers(seed: int = 0) -> list[Blocks]:
    """Return ``LAYERS`` layers whose experts all differ."""
    draw = np.random.default_rng(seed).standard_normal

    def block() -> np.ndarray:
        size = (INTERMEDIATE, HIDDEN)
        return pack_expert(
            SHAPE,
            gate=draw(size, np.float32),
            up=draw(size, np.float32),
            down=draw(size[::-1], np.float32),
        )

    return [Blocks(np.stack([block() for _ in range(EXPERTS)]), SHAPE) for _ in range(LAYERS)]


def shared_executor(
    layers: list[Blocks],
    slots: int,
    *,
    device: Any = None,
    capacity_slots: int | None = None,
    policy: Callable[[int, int], Any] = LRU,
    hardware: HardwareSpec | None = None,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> Executor:
    """Return an executor with an exact emulated device, unless another is given."""
    layout = SHAPE.with_stride(layers[0].blocks.shape[1])
    cost = CostModel(SPEC, hardware or find_hardware("rtx4060-laptop-8gb"), "q4_0")
    kept = policy(LAYERS, EXPERTS)
    if device is None:
        room = (slots if capacity_slots is None else capacity_slots) + STAGING
        device = open_device("emulated", room * layout.stride, 1)

    def director(count: int) -> Director:
        cache = ExpertCache(kept, equal_capacities(count, LAYERS, EXPERTS))
        return Director(cost, cache, deciding_s=0.0)

    guard = DeviceGuard(device, layers, director, slots, timeout_s=timeout_s)
    return Executor(guard, DenseSeconds(cost, 16), threads=1, **options)


def random_step(rng: np.random.Generator, tokens: int) -> tuple[Any, Any, Any]:
    """Return hidden states, ids (some without weights) and routing weights."""
    hidden = torch.from_numpy(rng.standard_normal((tokens, HIDDEN), np.float32))
    ids = np.stack([rng.permutation(EXPERTS + 1)[:TOP_K] for _ in range(tokens)])
    weights = torch.from_numpy(rng.random((tokens, TOP_K), np.float32))
    return hidden, torch.from_numpy(ids), weights


def on_cpu(layer: Blocks, hidden: Any, ids: Any, weights: Any) -> np.ndarray:
    """What the CPU alone computes."""
    out = np.zeros(hidden.shape, np.float32)
    run_experts(hidden.numpy(), ids.numpy(), weights.numpy(), layer.blocks, layer.shape, out)
    return out


def exact(executor: Executor) -> EmulatedDevice:
    """Return the executor's device, which is still in use."""
    assert isinstance(executor.device, EmulatedDevice)
    return executor.device
