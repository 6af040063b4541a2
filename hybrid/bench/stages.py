"""Sets a stage for sharing experts: a device, all layers' experts, and what surrounds them.

On an emulated device attention and dense layers are waited for, like everything else that a GPU
would do: no model is needed, and outputs mean nothing. Copies do not read this machine's memory:
the CPU is not slowed down by them. On a GPU (:mod:`hybrid.bench.gpu_stage`) all of it is real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpu_experts.device import Device
from gpu_experts.emulated.device import EmulatedDevice
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.strips import pad
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.packed.bf16_products import panels_from
from hybrid.packed.experts import BareLayer, PackedLayer
from hybrid.sharing.partners import Launcher
from planner.cost.cost import CostModel
from planner.foretell.memory import STAGING

FORMAT = "q4_0"
_PAGE = 4096
_TIMEOUT_S = 60.0

Run = Callable[[int, Tensor], Tensor]
"""``run(layer, hidden)``: the routed experts of a MoE layer, with the routing that is replayed."""


class Stage(Protocol):
    """One model's shape on one machine; rules take turns on it."""

    @property
    def device(self) -> Device:
        """What experts are shared with; opened anew for every rule."""

    @property
    def layers(self) -> Sequence[PackedLayer]:
        """Experts of all MoE layers."""

    @property
    def cost(self) -> CostModel:
        """What the planner predicts."""

    @property
    def seconds(self) -> DenseSeconds:
        """What is predicted of all but the routed experts."""

    @property
    def shared(self) -> Launcher:
        """What starts shared experts."""

    @property
    def uncounted(self) -> int:
        """Rounds until times settle."""

    def limit(self, layers: int) -> None:
        """Look no more than so many layers ahead from now on."""

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Do what looking ahead costs at a layer; what it tells is replayed."""

    def forward(self, tokens: int, first: bool, run: Run) -> None:
        """Compute a step of ``tokens``, the ``first`` of a sequence or not, to its end."""

    def close(self) -> None:
        """Give everything back."""


class _SharedExperts:
    """Stands for the shared experts: time on the device's compute lane."""

    def __init__(self, device: EmulatedDevice, seconds: DenseSeconds) -> None:
        self._device, self._seconds = device, seconds

    def launch(self, layer: int, hidden: Tensor) -> None:
        """Occupy the device for as long as the layer's shared expert takes."""
        seconds = self._seconds.shared(layer, len(hidden))
        if seconds:
            self._device.occupy(seconds, f"layer {layer}: shared expert")

    def abandon(self) -> None:
        """Nothing is kept."""


class Emulated:
    """A device in timing mode with a described machine's link and speed; see :class:`Stage`."""

    uncounted = 0

    def __init__(self, cost: CostModel) -> None:
        gpu, link = cost.hardware.gpu, cost.hardware.link
        assert gpu is not None
        assert link is not None
        self.cost = cost
        self.seconds = DenseSeconds(cost, 0)
        self.layers = _experts_in_memory(cost)
        blocks = cost.model.experts.count * len(self.layers) + STAGING
        self.device = EmulatedDevice(
            blocks * self.layers[0].blocks.shape[1],
            mode="timing",
            link_bytes_per_s=link.bytes_per_s.value,
            link_latency_s=link.latency_s.value,
            launch_s=gpu.launch_s.value,
            expert_s=cost.experts.gpu_s,
        )
        self.shared = _SharedExperts(self.device, self.seconds)

    def limit(self, layers: int) -> None:
        """Nothing is saved."""

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Nothing to compute."""
        return torch.empty(0)

    def forward(self, tokens: int, first: bool, run: Run) -> None:
        """Wait for attention and head, run the experts."""
        hidden = torch.zeros(tokens, self.cost.model.experts.hidden)
        for layer in range(len(self.layers)):
            self.device.occupy(self.seconds.mixer(layer, tokens), f"layer {layer}: attention")
            run(layer, hidden)
        self.device.occupy(self.seconds.head(tokens), "output head").wait(_TIMEOUT_S)

    def close(self) -> None:
        """Give the slots back."""
        self.device.close()


def _experts_in_memory(cost: CostModel) -> list[BareLayer]:
    """Experts of all layers, every one in memory of its own."""
    experts = cost.model.experts
    shape = Block(hidden=experts.hidden, intermediate=experts.intermediate, format=FORMAT)
    draw = np.random.default_rng(0).standard_normal
    size = (experts.intermediate, experts.hidden)
    block = pack_expert(
        shape,
        gate=draw(size, np.float32),
        up=draw(size, np.float32),
        down=draw(size[::-1], np.float32),
    )
    padded = np.zeros(pad(shape.block_bytes, _PAGE), np.uint8)
    padded[: block.size] = block
    least_load = panels_from(shape, cost.hardware)
    return [
        BareLayer(np.tile(padded, (experts.count, 1)), shape, least_load)
        for _ in range(cost.model.moe_layers)
    ]
