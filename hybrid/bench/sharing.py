"""Runs rules of sharing experts between CPU and GPU, by the executor on a stage.

The executor runs for real: its decisions, its bookkeeping and the CPU's experts take the time they
take on this machine. What the GPU does, and what surrounds the experts, is the stage's: real, or
waited for (:mod:`hybrid.bench.stages`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.bench.stages import Stage
from hybrid.errors import UsageError
from hybrid.sharing.device_guard import DeviceGuard
from hybrid.sharing.executor import Executor
from planner.decide import policies
from planner.decide.baselines import all_cpu, on_demand, static_split
from planner.decide.cache import ExpertCache
from planner.decide.capacity import equal_capacities
from planner.decide.director import Director, Scheduler
from planner.decide.popularity import Popularity
from planner.decide.schedule import schedule
from planner.describe.model import ModelSpec
from planner.foretell.routing import RECALL, Routing

BASELINE = "static split"


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
        Of the cache, which knows what other text used.
    prefetch, refill
        What idle link time is used for; see :class:`planner.decide.director.Director`.
    by_layer
        Whether slots go to whole layers, the first ones, instead of being shared out evenly.
    """

    name: str
    meaning: str
    scheduler: Scheduler
    policy: str
    prefetch: bool = False
    refill: bool = False
    by_layer: bool = False


RULES = (
    Rule("all CPU", "every routed expert on the CPU", all_cpu, "static"),
    Rule("on demand", "all on the GPU, LRU cache", on_demand, "lru"),
    Rule(
        "whole layers",
        "all experts of the first layers on the GPU, as llama.cpp splits",
        static_split,
        "static",
        by_layer=True,
    ),
    Rule(BASELINE, "the most used of other text on the GPU, the rest not", static_split, "static"),
    Rule("+ schedule", "the same experts resident, placed by the planner", schedule, "static"),
    Rule(
        "+ cache",
        "and kept by what the router weighed",
        schedule,
        policies.DEFAULT_POLICY,
        refill=True,
    ),
    Rule(
        "+ prefetch",
        "and copied ahead of their router, where that pays",
        schedule,
        policies.DEFAULT_POLICY,
        prefetch=True,
        refill=True,
    ),
)


class _Replay:
    """Stands for the routers of later layers: what the routing says they would have told."""

    def __init__(self, routing: Routing, layers: int, stage: Stage) -> None:
        self._routing, self._layers, self._stage = routing, layers, stage
        self._most = len(RECALL)
        self.step = -1
        """The decode step; -1 is the prompt."""

    def limit(self, layers: int) -> None:
        """Predict no more than so many layers."""
        self._most = layers
        self._stage.limit(layers)

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Take the time that it takes, while there is a layer to predict."""
        return self._stage.scores(layer, hidden) if layer + 1 < self._layers else None

    def probabilities(
        self, layer: int, scores: NDArray[Any]
    ) -> list[tuple[int, NDArray[np.float64]]]:
        """What is believed of the next layers."""
        last = min(layer + self._most, self._layers - 1)
        return [
            (ahead, self._routing.expected(self.step, ahead, ahead - layer))
            for ahead in range(layer + 1, last + 1)
        ]

    expected_loads = probabilities

    def learn(self, layer: int, ids: NDArray[Any]) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Scene:
    """What is played on a stage.

    Parameters
    ----------
    stage
        Where.
    prompt
        Tokens of the prompt.
    routing
        Of the prompt and of the decoded tokens.
    known
        What other text used.
    threads
        Of the CPU's kernels.
    """

    stage: Stage
    prompt: int
    routing: Routing
    known: Popularity
    threads: int

    @property
    def model(self) -> ModelSpec:
        """Cut to the layers that are run."""
        return self.stage.cost.model

    def prompt_ids(self, layer: int) -> NDArray[np.int64]:
        """Ids ``[T, A]`` whose loads are the routing's; a token's experts differ."""
        loads, experts = self.routing.prompt[layer], self.model.experts
        flat = np.full(self.prompt * experts.top_k, experts.count + experts.identity)
        used = np.repeat(np.arange(loads.size), loads)[: flat.size]
        flat[: used.size] = used
        return flat.reshape(experts.top_k, -1).T.copy()


def _whole_layers(total: int, layers: int, experts: int) -> tuple[int, ...]:
    """Give the first layers a slot for every expert, as far as ``total`` slots go."""
    return tuple(min(experts, max(0, total - layer * experts)) for layer in range(layers))


class Runner:
    """One rule at work on a scene.

    Raises
    ------
    UsageError
        When the device has no room for the slots, here or later, or fails.
    """

    def __init__(self, scene: Scene, rule: Rule, slots: int) -> None:
        self.scene, self.rule, self.slots = scene, rule, slots
        stage, model = scene.stage, scene.model
        self.stage = stage
        self.lookahead = _Replay(scene.routing, model.moe_layers, stage)

        def director(count: int) -> Director:
            capacities = equal_capacities(count, model.moe_layers, model.experts.count)
            if rule.by_layer:
                capacities = _whole_layers(count, model.moe_layers, model.experts.count)
            shape = model.moe_layers, model.experts.count
            policy = policies.policy(rule.policy, *shape, popularity=scene.known)
            return Director(
                stage.cost,
                ExpertCache(policy, capacities),
                scheduler=rule.scheduler,
                prefetch=rule.prefetch,
                refill=rule.refill,
            )

        self.executor = Executor(
            DeviceGuard(stage.device, stage.layers, director, slots),
            stage.seconds,
            threads=scene.threads,
            lookahead=self.lookahead if rule.prefetch else None,
            shared=stage.shared,
        )
        self.executor.guard.warm()

    def step(self, ids: Sequence[Tensor], weights: Sequence[Tensor], context: int) -> float:
        """Run all layers on the tokens' choices, ``[T, A]`` a layer; return the seconds."""
        tokens = len(ids[0])

        def run(layer: int, hidden: Tensor) -> Tensor:
            return self.executor.run_layer(layer, hidden, ids[layer], weights[layer])

        start_s = time.perf_counter()
        self.executor.begin_step(prompt=tokens > 1, context=context)
        self.stage.forward(tokens, context == self.scene.prompt, run)
        self.executor.end_step(self.stage.seconds.head(tokens))
        return time.perf_counter() - start_s

    def run(self) -> tuple[float, list[float]]:
        """Prefill the prompt, then decode every step; return the seconds of each."""
        scene, routing = self.scene, self.scene.routing
        layers, where = range(scene.model.moe_layers), self.stage.device.torch_device

        def placed(array: NDArray[Any]) -> Tensor:
            """What a router answers lies where the model computes."""
            return torch.from_numpy(np.ascontiguousarray(array)).to(where)

        ids = [placed(scene.prompt_ids(layer)) for layer in layers]
        even = placed(np.full(tuple(ids[0].shape), 1 / scene.model.experts.top_k, np.float32))
        steps = [
            (
                [placed(routing.decode[at, layer]) for layer in layers],
                [placed(routing.weights[at, layer]) for layer in layers],
            )
            for at in range(len(routing.decode))
        ]
        self.executor.timeline.forget()
        self.lookahead.step = -1
        prefill_s = self.step(ids, [even] * len(ids), scene.prompt)
        decode_s = []
        for at, step in enumerate(steps):
            self.lookahead.step = at
            decode_s.append(self.step(*step, scene.prompt + at + 1))
        self._check()
        return prefill_s, decode_s

    def _check(self) -> None:
        """Raise unless all of it ran as it was meant to."""
        executor = self.executor
        if executor.device is None or executor.slot_count != self.slots:
            note = executor.notes[-1]
            raise UsageError(
                f"{note.what} ({self.rule.name}, {self.slots} slots): {note.reason}",
                hint="choose fewer layers with --layers, or smaller shares with --resident",
            )
        executor.residents.check_integrity()
