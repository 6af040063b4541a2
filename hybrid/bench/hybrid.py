"""``hybrid bench hybrid``: ways to share experts between CPU and GPU, measured turn by turn.

The executor runs for real: its decisions, its bookkeeping and the CPU's experts take the time they
take on this machine. What a GPU would do is waited for: an emulated device in timing mode with the
link and the speed of a described machine. Attention and dense layers are waited for likewise, so no
model is needed and outputs mean nothing. Copies do not read this machine's memory: the CPU is not
slowed down by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_experts.experts import ExpertShape, pack_expert
from cpu_experts.formats import pad
from gpu_experts.emulated import EmulatedDevice
from gpu_experts.layout import BlockLayout
from gpu_experts.slots import SlotTable
from hybrid import host
from hybrid.bench.record import provenance, spread
from hybrid.errors import UsageError
from hybrid.executor import Executor, Residents
from hybrid.model import set_threads
from hybrid.placement import STAGING, DenseSeconds
from hybrid.planning import find_hardware, find_model
from hybrid.store import U8
from hybrid.timeline import DECODE, Timeline
from planner.baselines import all_cpu, on_demand, static_split
from planner.cache import ExpertCache, Policy
from planner.capacity import equal_capacities
from planner.cost import CostModel
from planner.director import Director, Scheduler
from planner.errors import TraceError
from planner.hardware import HardwareSpec
from planner.model import ModelSpec
from planner.policies import LRU, MRS, StaticPopularity
from planner.routing import RECALL, Routing, from_trace, synthetic
from planner.schedule import schedule

MODELS = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite")
SHARES = (0.25, 0.5, 0.75)
"""Slots over experts."""
PROMPTS = (128, 512)
TOKENS = 32
FORMAT = "q4_0"
BASELINE = "static split"
_PAGE = 4096
_MEMORY_SHARE = 0.6
"""Part of the free memory that experts may take."""


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
        Makes the cache policy from the number of uses of every expert, ``[L, E]``.
    prefetch, refill
        What idle link time is used for; see :class:`planner.director.Director`.
    """

    name: str
    meaning: str
    scheduler: Scheduler
    policy: Callable[[NDArray[np.int64]], Policy]
    prefetch: bool = False
    refill: bool = False


def _static(uses: NDArray[np.int64]) -> Policy:
    return StaticPopularity(*uses.shape, counts=uses)


RULES = (
    Rule("all CPU", "every routed expert on the CPU", all_cpu, _static),
    Rule("on demand", "all on the GPU, LRU cache", on_demand, lambda uses: LRU(*uses.shape)),
    Rule(
        BASELINE, "the most used on the GPU, in hindsight; others on the CPU", static_split, _static
    ),
    Rule("+ schedule", "the same experts resident, placed by the planner", schedule, _static),
    Rule(
        "+ cache", "and kept by recent scores", schedule, lambda uses: MRS(*uses.shape), refill=True
    ),
    Rule(
        "+ prefetch",
        "and copied ahead of their router",
        schedule,
        lambda uses: MRS(*uses.shape),
        prefetch=True,
        refill=True,
    ),
)


@dataclass(frozen=True)
class _Layer:
    blocks: U8
    shape: ExpertShape


class _Replay:
    """Stands for the routers of later layers: what the routing says they would have guessed."""

    def __init__(self, routing: Routing, layers: int) -> None:
        self._routing, self._layers = routing, layers
        self.step: int | None = None

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Nothing to compute: a placeholder while there is a layer to predict."""
        ahead = self.step is not None and layer + 1 < self._layers
        return torch.empty(0) if ahead else None

    def probabilities(
        self, layer: int, scores: NDArray[Any]
    ) -> list[tuple[int, NDArray[np.float64]]]:
        """Belief in the next layer's experts."""
        routing = self._routing
        guess = routing.guess[self.step, layer + 1].ravel()
        belief = np.full(routing.experts, (1 - RECALL) * guess.size / routing.experts)
        belief[guess[guess < routing.experts]] = RECALL
        return [(layer + 1, belief)]

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
    threads
        Of the CPU's kernels.
    """

    def __init__(
        self, model: ModelSpec, hardware: HardwareSpec, routing: Routing, threads: int
    ) -> None:
        self.model, self.hardware, self.routing = model, hardware, routing
        self.threads = threads
        self.cost = CostModel(model, hardware, FORMAT)

    @cached_property
    def layers(self) -> list[_Layer]:
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
            _Layer(np.tile(padded, (experts.count, 1)), shape) for _ in range(self.model.moe_layers)
        ]

    def prompt_ids(self, layer: int) -> NDArray[np.int64]:
        """Ids ``[T, A]`` whose loads are the routing's; a token's experts differ."""
        loads = self.routing.prompt[layer]
        top_k = self.model.experts.top_k
        flat = np.repeat(np.arange(loads.size), loads)
        flat = flat[: flat.size // top_k * top_k]
        return flat.reshape(top_k, -1).T.copy()


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
        uses = scene.routing.uses()[:, : model.experts.count]

        def settle(count: int) -> Residents:
            self.device.open(layout, count + STAGING)
            capacities = equal_capacities(count, model.moe_layers, model.experts.count)
            cache = ExpertCache(rule.policy(uses), capacities)
            director = Director(
                cost, cache, scheduler=rule.scheduler, prefetch=rule.prefetch, refill=rule.refill
            )
            return Residents(SlotTable(count, STAGING), director)

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
        self.executor.warm(uses)

    def step(
        self, ids: Sequence[NDArray[np.int64]], weights: Sequence[NDArray[np.float32]]
    ) -> float:
        """Run all layers on the tokens' choices, ``[T, A]`` a layer; return the seconds."""
        tokens = len(ids[0])
        hidden = torch.zeros(tokens, self.scene.model.experts.hidden)
        start_s = time.perf_counter()
        self.executor.begin_step()
        for layer, (chosen, factors) in enumerate(zip(ids, weights, strict=True)):
            self.device.occupy(self.seconds.mixer(layer, tokens), f"layer {layer}: attention")
            self.executor.run_layer(
                layer, hidden, torch.from_numpy(chosen), torch.from_numpy(factors)
            )
        head_s = self.seconds.head(tokens)
        self.device.occupy(head_s, "output head").wait(60.0)
        self.executor.end_step(tokens, head_s)
        return time.perf_counter() - start_s

    def run(self) -> tuple[float, list[float]]:
        """Prefill the prompt, then decode every step; return the seconds of each."""
        scene, routing = self.scene, self.scene.routing
        layers = range(scene.model.moe_layers)
        self.executor.timeline = Timeline()
        self.lookahead.step = None
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
        self.executor.check_integrity()
        return prefill_s, decode_s


def run(
    models: Sequence[str] = MODELS,
    *,
    hardware: HardwareSpec,
    shares: Sequence[float] = SHARES,
    prompts: Sequence[int] = PROMPTS,
    tokens: int = TOKENS,
    layers: int | None = None,
    trace: Path | None = None,
    repeat: int = 3,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every rule on every model, share of resident experts and prompt.

    Parameters
    ----------
    models
        Names of shipped models.
    hardware
        This machine's CPU as it was calibrated, with the device and link to emulate.
    shares
        Slots over experts.
    prompts, tokens
        Tokens of each prompt, and decoded after it.
    layers
        MoE layers of each model; as many as memory holds unless given.
    trace
        A routing trace for the models that it fits; the others' routing is made up.
    repeat
        Rounds; in each, every rule has its turn.

    Raises
    ------
    UsageError
        When the hardware has no GPU, or memory does not hold a single layer.
    """
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    if hardware.gpu is None or hardware.link is None:
        raise UsageError(
            f"{hardware.name} has no GPU to emulate", hint="choose hardware with one (--device)"
        )
    rows: list[dict[str, Any]] = []
    for name in models:
        full = find_model(name)
        model = _cut(full, layers or _layers_that_fit(full, hardware))
        shared: list[_Layer] | None = None
        for prompt in prompts:
            routing = _routing(full, prompt, tokens, trace, model.moe_layers)
            scene = Scene(model, hardware, routing, threads)
            if shared is not None:
                scene.__dict__["layers"] = shared  # the experts do not depend on the prompt
            shared = scene.layers
            for share in shares:
                rows += _compare(scene, name, prompt, share, repeat, progress)
        del shared
    return {
        **provenance("hybrid bench hybrid", threads),
        "emulated": f"{hardware.gpu.name}, link {hardware.link.bytes_per_s.value / 1e9:.1f} GB/s",
        "format": FORMAT,
        "repeat": repeat,
        "results": rows,
        "summary": _summary(rows),
    }


def _compare(
    scene: Scene,
    name: str,
    prompt: int,
    share: float,
    repeat: int,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Give every rule its turn in every round."""
    experts = scene.model.experts.count * scene.model.moe_layers
    prefill: dict[str, list[float]] = {rule.name: [] for rule in RULES}
    decode: dict[str, list[float]] = {rule.name: [] for rule in RULES}
    last: dict[str, Runner] = {}
    for round_ in range(repeat):
        progress(f"{name}, {prompt} tokens, {share:.0%} resident: round {round_ + 1} of {repeat}")
        for rule in RULES:
            runner = Runner(scene, rule, int(share * experts), share)
            prefill_s, decode_s = runner.run()
            prefill[rule.name].append(prefill_s)
            decode[rule.name].append(median(decode_s))
            last[rule.name] = runner
            runner.device.close()
    for rule in RULES:
        phase = last[rule.name].executor.timeline.phases[DECODE]
        figures = last[rule.name].executor.director.prefetcher
        yield {
            "model": name,
            "moe_layers": scene.model.moe_layers,
            "routing": scene.routing.origin,
            "prompt": prompt,
            "resident_share": share,
            "rule": rule.name,
            "prefill": spread(prefill[rule.name]),
            "decode": spread(decode[rule.name]),
            "prefill_speedup": _ratio(prefill[BASELINE], prefill[rule.name]),
            "decode_speedup": _ratio(decode[BASELINE], decode[rule.name]),
            "hit_rate": phase.hits / phase.activated,
            "prefetch_precision": figures.prefetch_precision,
            "prefetched": figures.fetched,
            "decode_terms_s": {
                term: {"predicted": predicted, "measured": measured}
                for term, predicted, measured in phase.rows()
            },
            "decode_predicted_s": phase.predicted.step_s,
            "decode_measured_mean_s": phase.measured.step_s,
        }


def _ratio(baseline: list[float], ours: list[float]) -> float:
    """Median of the rounds' ratios: how many times as fast."""
    return median(b / o for b, o in zip(baseline, ours, strict=True))


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean speedup of every rule over all cases, as the geometric mean."""
    return [
        {
            "rule": rule.name,
            **{
                f"{phase}_speedup": geometric_mean(
                    row[f"{phase}_speedup"] for row in rows if row["rule"] == rule.name
                )
                for phase in ("prefill", "decode")
            },
        }
        for rule in RULES
    ]


def _layers_that_fit(model: ModelSpec, hardware: HardwareSpec) -> int:
    layer = CostModel(model, hardware, FORMAT).experts.bytes * model.experts.count
    free = psutil.virtual_memory().available
    fitting = int(free * _MEMORY_SHARE / layer)
    if fitting < 1:
        raise UsageError(
            f"one layer of {model.name} takes {layer / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB of memory are free",
            hint="close other programs, or choose a smaller model",
        )
    return min(fitting, model.moe_layers)


def _cut(model: ModelSpec, moe_layers: int) -> ModelSpec:
    """Keep the first MoE layers and the dense layers before them."""
    kept, seen = 0, 0
    while seen < moe_layers:
        seen += model.layers[kept].moe
        kept += 1
    return replace(model, layers=model.layers[:kept])


def _routing(
    model: ModelSpec, prompt: int, tokens: int, trace: Path | None, moe_layers: int
) -> Routing:
    """Return the routing of the first MoE layers."""
    routing = None
    if trace is not None:
        try:
            routing = from_trace(trace, model, prompt, tokens)
        except TraceError:  # of another model
            routing = None
    if routing is None:
        routing = synthetic(model, prompt, tokens)
    return replace(
        routing,
        prompt=routing.prompt[:moe_layers],
        prompt_weights=routing.prompt_weights[:moe_layers],
        decode=routing.decode[:, :moe_layers],
        weights=routing.weights[:, :moe_layers],
        guess=routing.guess[:, :moe_layers],
    )


def emulated_hardware(cpu: HardwareSpec, device: str) -> HardwareSpec:
    """Return this machine's ``cpu`` with the GPU and link of the described machine ``device``."""
    other = find_hardware(device)
    if other.gpu is None:
        raise UsageError(f"{other.name} has no GPU to emulate", hint="choose hardware with one")
    points = tuple(point for point in cpu.points if point.lane == "cpu")
    return replace(
        cpu,
        name=f"this CPU with the GPU of {other.name}",
        gpu=other.gpu,
        link=other.link,
        points=points,
    )


def hybrid_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    lines = [f"emulated: {result['emulated']}; {result['threads']} threads of this CPU"]
    case = None
    for row in result["results"]:
        here = (row["model"], row["prompt"], row["resident_share"])
        if here != case:
            case = here
            lines += [
                "",
                f"{row['model']}, {row['moe_layers']} MoE layers, prompt {row['prompt']}, "
                f"{row['resident_share']:.0%} of the experts resident; {row['routing']}",
                f"{'':<14}{'prefill ms':>11}{'x static':>9}{'decode ms':>11}{'x static':>9}"
                f"{'hits':>7}{'predicted':>11}",
            ]
        lines.append(
            f"{row['rule']:<14}{row['prefill']['seconds_median'] * 1e3:>11.1f}"
            f"{row['prefill_speedup']:>9.2f}{row['decode']['seconds_median'] * 1e3:>11.2f}"
            f"{row['decode_speedup']:>9.2f}{row['hit_rate']:>7.0%}"
            f"{row['decode_predicted_s'] * 1e3:>11.2f}"
        )
    lines += ["", f"{'mean over all':<25}{'prefill':>9}{'':>11}{'decode':>9}"]
    for row in result["summary"]:
        lines.append(
            f"{row['rule']:<25}{row['prefill_speedup']:>9.2f}{'':>11}{row['decode_speedup']:>9.2f}"
        )
    return "\n".join(lines)
