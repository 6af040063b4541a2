"""Ways to share experts between CPU and GPU, run by the executor on an emulated device.

The executor runs for real: its decisions, its bookkeeping and the CPU's experts take the time they
take on this machine. What a GPU would do is waited for: a device in timing mode with the link and
the speed of a described machine. Attention and dense layers are waited for likewise, so no model
is needed and outputs mean nothing. Copies do not read this machine's memory: the CPU is not slowed
down by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_experts.experts import ExpertShape, pack_expert
from cpu_experts.formats import pad
from gpu_experts.emulated import EmulatedDevice
from gpu_experts.layout import BlockLayout
from gpu_experts.slots import SlotTable
from hybrid.dense_seconds import DenseSeconds
from hybrid.executor import Executor
from hybrid.residents import Opened
from hybrid.store import U8
from hybrid.timeline import Timeline
from planner.baselines import all_cpu, on_demand, static_split
from planner.cache import ExpertCache, Policy
from planner.capacity import equal_capacities
from planner.cost import CostModel
from planner.director import Director, Scheduler
from planner.hardware import HardwareSpec
from planner.memory import STAGING
from planner.model import ModelSpec
from planner.policies import LRU, StaticPopularity
from planner.popularity import Popularity, informed
from planner.routing import RECALL, Routing
from planner.schedule import schedule

FORMAT = "q4_0"
BASELINE = "static split"
_PAGE = 4096


@dataclass(frozen=True)
class Rule:
    """A way to share experts.

    Parameters
    ----------
    name, meaning
        For the report.
    scheduler
        Places one layer's experts.
    policy
        Makes the cache policy from what other text used.
    prefetch, refill
        What idle link time is used for; see :class:`planner.director.Director`.
    by_layer
        Whether slots go to whole layers, the first ones, instead of being shared out evenly.
    """

    name: str
    meaning: str
    scheduler: Scheduler
    policy: Callable[[Popularity], Policy]
    prefetch: bool = False
    refill: bool = False
    by_layer: bool = False


def _static(known: Popularity) -> Policy:
    layers, experts = known.uses.shape
    return StaticPopularity(layers, experts, known.uses)


def _lru(known: Popularity) -> Policy:
    policy = LRU(*known.uses.shape)
    for layer, uses in enumerate(known.uses):  # the most used counts as used last
        policy.observe_one(layer, np.argsort(uses, kind="stable"), uses.astype(np.float64), 1)
    return policy


def _ours(known: Popularity) -> Policy:
    layers, experts = known.uses.shape
    return informed(layers, experts, known)


RULES = (
    Rule("all CPU", "every routed expert on the CPU", all_cpu, _static),
    Rule("on demand", "all on the GPU, LRU cache", on_demand, _lru),
    Rule(
        "whole layers",
        "all experts of the first layers on the GPU, as llama.cpp splits",
        static_split,
        _static,
        by_layer=True,
    ),
    Rule(BASELINE, "the most used of other text on the GPU, the rest not", static_split, _static),
    Rule("+ schedule", "the same experts resident, placed by the planner", schedule, _static),
    Rule("+ cache", "and kept by what the router weighed", schedule, _ours, refill=True),
    Rule(
        "+ prefetch",
        "and copied ahead of their router, where that pays",
        schedule,
        _ours,
        prefetch=True,
        refill=True,
    ),
)


@dataclass(frozen=True)
class Layer:
    blocks: U8
    shape: ExpertShape


class _Replay:
    """Stands for the routers of later layers: what the routing says they would have told."""

    def __init__(self, routing: Routing, layers: int) -> None:
        self._routing, self._layers = routing, layers
        self.step = -1
        """The decode step; -1 is the prompt."""

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Nothing to compute: a placeholder while there is a layer to predict."""
        return torch.empty(0) if layer + 1 < self._layers else None

    def probabilities(
        self, layer: int, scores: NDArray[Any]
    ) -> list[tuple[int, NDArray[np.float64]]]:
        """What is believed of the next three layers."""
        last = min(layer + len(RECALL), self._layers - 1)
        return [
            (ahead, self._routing.expected(self.step, ahead, ahead - layer))
            for ahead in range(layer + 1, last + 1)
        ]

    expected_loads = probabilities

    def learn(self, layer: int, ids: NDArray[Any]) -> None:
        """Nothing to learn."""


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


class Scene:
    """One model's shape on one machine: experts in memory, routing, predictions.

    Parameters
    ----------
    model
        Cut to the layers that are run.
    hardware
        This machine's CPU with the described machine's device and link.
    routing
        Of the prompt and of the decoded tokens.
    known
        What other text used.
    threads
        Of the CPU's kernels.
    """

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        routing: Routing,
        known: Popularity,
        threads: int,
    ) -> None:
        self.model, self.hardware, self.routing = model, hardware, routing
        self.known = known
        self.threads = threads
        self.cost = CostModel(model, hardware, FORMAT)

    @cached_property
    def layers(self) -> list[Layer]:
        """Experts of all layers, every one in memory of its own."""
        experts = self.model.experts
        shape = ExpertShape(hidden=experts.hidden, intermediate=experts.intermediate, format=FORMAT)
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
        return [
            Layer(np.tile(padded, (experts.count, 1)), shape) for _ in range(self.model.moe_layers)
        ]

    def prompt_ids(self, layer: int) -> NDArray[np.int64]:
        """Ids ``[T, A]`` whose loads are the routing's; a token's experts differ."""
        loads = self.routing.prompt[layer]
        top_k = self.model.experts.top_k
        flat = np.repeat(np.arange(loads.size), loads)
        flat = flat[: flat.size // top_k * top_k]
        return flat.reshape(top_k, -1).T.copy()


def _whole_layers(total: int, layers: int, experts: int) -> tuple[int, ...]:
    """Give the first layers a slot for every expert, as far as ``total`` slots go."""
    return tuple(min(experts, max(0, total - layer * experts)) for layer in range(layers))


class Runner:
    """One rule at work on a scene."""

    def __init__(self, scene: Scene, rule: Rule, slots: int, share: float) -> None:
        self.scene, self.rule, self.share = scene, rule, share
        cost, model = scene.cost, scene.model
        gpu, link = scene.hardware.gpu, scene.hardware.link
        assert gpu is not None
        assert link is not None
        layer = scene.layers[0]
        layout = BlockLayout.of(layer.shape, layer.blocks.shape[1])
        self.device = EmulatedDevice(
            (slots + STAGING) * layout.stride,
            mode="timing",
            link_bytes_per_s=link.bytes_per_s.value,
            link_latency_s=link.latency_s.value,
            expert_s=cost.experts.gpu_s,
        )
        self.seconds = DenseSeconds(cost, scene.routing.decode.shape[0])
        self.lookahead = _Replay(scene.routing, model.moe_layers)

        def settle(count: int) -> Opened:
            self.device.open(layout, count + STAGING)
            capacities = equal_capacities(count, model.moe_layers, model.experts.count)
            if rule.by_layer:
                capacities = _whole_layers(count, model.moe_layers, model.experts.count)
            cache = ExpertCache(rule.policy(scene.known), capacities)
            director = Director(
                cost, cache, scheduler=rule.scheduler, prefetch=rule.prefetch, refill=rule.refill
            )
            return Opened(SlotTable(count, STAGING), director)

        self.executor = Executor(
            scene.layers,
            self.device,
            settle,
            slots,
            self.seconds,
            threads=scene.threads,
            lookahead=self.lookahead if rule.prefetch else None,
            shared=_SharedExperts(self.device, self.seconds),
        )
        self.executor.warm()

    def step(
        self, ids: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float32]]
    ) -> float:
        """Run all layers on the tokens' choices, ``[T, A]`` a layer; return the seconds."""
        tokens = len(ids[0])
        hidden = torch.zeros(tokens, self.scene.model.experts.hidden)
        start_s = time.perf_counter()
        self.executor.begin_step(prompt=tokens > 1, context=len(self.scene.routing.decode))
        for layer, (chosen, factors) in enumerate(zip(ids, weights, strict=True)):
            self.device.occupy(self.seconds.mixer(layer, tokens), f"layer {layer}: attention")
            self.executor.run_layer(
                layer, hidden, torch.from_numpy(chosen), torch.from_numpy(factors)
            )
        head_s = self.seconds.head(tokens)
        self.device.occupy(head_s, "output head").wait(60.0)
        self.executor.end_step(head_s)
        return time.perf_counter() - start_s

    def run(self) -> tuple[float, list[float]]:
        """Prefill the prompt, then decode every step; return the seconds of each."""
        scene, routing = self.scene, self.scene.routing
        layers = range(scene.model.moe_layers)
        self.executor.timeline = Timeline()
        self.lookahead.step = -1
        prompt = [scene.prompt_ids(layer) for layer in layers]
        even = np.float32(1 / scene.model.experts.top_k)
        prefill_s = self.step(prompt, [np.full(ids.shape, even, np.float32) for ids in prompt])
        decode_s = []
        for at in range(len(routing.decode)):
            self.lookahead.step = at
            decode_s.append(
                self.step(
                    [routing.decode[at, layer] for layer in layers],
                    [np.ascontiguousarray(routing.weights[at, layer]) for layer in layers],
                )
            )
        self.executor.residents.check_integrity()
        return prefill_s, decode_s
