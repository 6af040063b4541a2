"""``hybrid bench hybrid``: every rule of sharing experts on every case, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import psutil

from hybrid import host
from hybrid.bench.record import provenance, spread
from hybrid.bench.sharing import BASELINE, FORMAT, RULES, Layer, Runner, Scene
from hybrid.calibrate import hardware_for
from hybrid.devices import EMULATED_AS, emulated_hardware
from hybrid.errors import UsageError
from hybrid.loading import set_threads
from hybrid.planning import find_hardware, find_model
from hybrid.timeline import DECODE
from planner.cost import CostModel
from planner.errors import TraceError
from planner.hardware import HardwareSpec
from planner.model import ModelSpec
from planner.popularity import Popularity
from planner.routing import Routing, from_trace, synthetic

MODELS = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite")
SHARES = (0.25, 0.5, 0.75)
"""Slots over experts."""
PROMPTS = (128, 512)
TOKENS = 32
OTHER_TOKENS = 1000
"""Tokens of the same routing, after those that are run, that say which experts are popular."""
_MEMORY_SHARE = 0.6
"""Part of the free memory that experts may take."""


def run(
    models: Sequence[str] = MODELS,
    *,
    device: str = EMULATED_AS,
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
    device
        The machine whose GPU and link are emulated. The CPU is this machine's, which is measured
        with each model's experts first if it was not before.
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
        When the device is none, or memory does not hold a single layer.
    """
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    like = find_hardware(device)
    rows: list[dict[str, Any]] = []
    for name in models:
        full = find_model(name)
        cpu = hardware_for(name, experts=FORMAT, threads=threads, progress=progress)
        hardware = emulated_hardware(cpu, like)
        model = _cut(full, layers or _layers_that_fit(full, hardware))
        shared: list[Layer] | None = None
        for prompt in prompts:
            routing, known = _routing(full, prompt, tokens, trace, model.moe_layers)
            scene = Scene(model, hardware, routing, known, threads)
            if shared is not None:
                scene.__dict__["layers"] = shared  # the experts do not depend on the prompt
            shared = scene.layers
            for share in shares:
                rows += _compare(scene, name, prompt, share, repeat, progress)
        del shared
    return {
        **provenance("hybrid bench hybrid", threads),
        "emulated": device,
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
) -> tuple[Routing, Popularity]:
    """Return the routing of the first MoE layers, and what the tokens after it used."""
    whole = None
    if trace is not None:
        try:
            whole = from_trace(trace, model, prompt, tokens + OTHER_TOKENS)
        except TraceError:  # of another model
            whole = None
    if whole is None:
        whole = synthetic(model, prompt, tokens + OTHER_TOKENS)
    routing = replace(
        whole.shortened(tokens),
        prompt=whole.prompt[:moe_layers],
        prompt_weights=whole.prompt_weights[:moe_layers],
        decode=whole.decode[:tokens, :moe_layers],
        weights=whole.weights[:tokens, :moe_layers],
        guess=whole.guess[:, :tokens, :moe_layers],
    )
    count = model.experts.count
    uses = np.stack(
        [
            np.bincount(whole.decode[tokens:, layer].ravel(), minlength=count)[:count]
            for layer in range(moe_layers)
        ]
    )
    return routing, Popularity(model.name, OTHER_TOKENS, uses)


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
