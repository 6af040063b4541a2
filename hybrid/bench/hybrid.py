"""Measures every rule of sharing experts on every case, in turn (``hybrid bench hybrid``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from gpu_experts.backends import BACKENDS
from hybrid.ask.asked_model import AskedModel, find_model
from hybrid.ask.counts import whole_number
from hybrid.ask.names import find_hardware
from hybrid.bench.record import Told, provenance, spread, untold
from hybrid.bench.sharing import BASELINE, RULES, Runner, Scene
from hybrid.bench.stages import FORMAT, Emulated, Stage
from hybrid.errors import UsageError
from hybrid.formats.registry import weight_bytes
from hybrid.ledger.residual import DECODE
from hybrid.loading import set_threads
from hybrid.machine import host
from hybrid.machine.devices import choose_device, open_device
from hybrid.machine.machines import EMULATED_AS, Machine, emulated_hardware
from hybrid.measure.calibrate import hardware_for
from planner.cost.cost import CostModel
from planner.decide.popularity import Popularity
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.describe.terms import HEAD, MIXER
from planner.describe.traces import read_trace
from planner.errors import TraceError
from planner.foretell.memory import STAGING
from planner.foretell.routing import Routing, from_trace, synthetic

MODELS = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite")
SHARES = (0.25, 0.5, 0.75)
"""Slots over experts."""
PROMPTS = (128, 512)
TOKENS = 32
OTHER_TOKENS = 1000
"""Tokens of the same routing, after those that are run, that say which experts are popular."""
BOUND = "all hits, no deciding"
"""In the summary: the most that a decode step could gain."""
_MEMORY_SHARE = 0.6
"""Part of the free memory that experts may take."""
_VRAM_SHARE = 0.8
"""Part of a GPU's free memory that slots and dense weights may take; cache and results do, too."""


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
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure every rule on every model, share of resident experts and prompt.

    Parameters
    ----------
    models
        Names of shipped models, or files like theirs.
    device
        ``"cuda"`` or ``"cuda:1"`` for a GPU of this machine, or the machine whose GPU and link are
        emulated. What is this machine's is measured with each model's shape first if it was not
        before.
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
    progress
        Called with a line about what is measured next.
    finished
        Called with the record so far and a line a rule after every case.

    Raises
    ------
    UsageError, PlannerError
        When there is no such model or device, a number cannot be, or a trace fits no model: before
        anything is measured. When memory does not hold a single layer.
    """
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    gpu = choose_device(device, None) if _names_gpu(device) else None
    like = find_hardware(device) if gpu is None else None
    if like is not None and like.gpu is None:
        raise UsageError(f"{device} has no GPU to emulate", hint="choose hardware with one")
    _check_numbers(shares, prompts, tokens, repeat)
    for name in models:
        _check_model(find_model(name, FORMAT).spec, max(prompts) + tokens, layers)
    if trace is not None:
        _check_trace(
            trace, [find_model(name, FORMAT).spec for name in models], max(prompts), tokens
        )
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"emulated": device}
    origin = provenance("hybrid bench hybrid", threads)
    result: dict[str, Any] = {}
    for name in models:
        wanted = find_model(name, FORMAT)
        options: dict[str, Any] = {"experts": FORMAT, "threads": threads, "progress": progress}
        if gpu is None:
            assert like is not None
            hardware = emulated_hardware(hardware_for(name, **options), like)
            fitting = _layers_that_fit(wanted.spec, hardware)
            stage: Stage = Emulated(CostModel(_cut(wanted.spec, layers or fitting), hardware))
        else:
            lengths = max(prompts) + tokens, max(shares)
            stage, about = _on_gpu(gpu, wanted, name, layers, *lengths, options)
        with closing(stage):
            for prompt in prompts:
                moe_layers = stage.cost.model.moe_layers
                routing, known = _routing(wanted.spec, prompt, tokens, trace, moe_layers)
                scene = Scene(stage, prompt, routing, known, threads)
                for share in shares:
                    new = list(_compare(scene, name, share, repeat, progress))
                    rows += new
                    result = {
                        **origin,
                        **about,
                        "format": FORMAT,
                        "repeat": repeat,
                        "results": rows,
                        "summary": _summary(rows),
                    }
                    finished(result, *map(_in_words, new))
    return result


def _names_gpu(device: str) -> bool:
    """Whether ``device`` begins as a GPU's name does; else it is that of a machine."""
    backend = BACKENDS.get(device.partition(":")[0])
    return backend is not None and not backend.emulated


def _in_words(row: dict[str, Any]) -> str:
    case = f"{row['model']}, {row['prompt']} tokens, {row['resident_share']:.0%} resident"
    return (
        f"{case}, {row['rule']}: prefill {row['prefill']['seconds_median'] * 1e3:.1f} ms "
        f"({row['prefill_speedup']:.2f} x static), decode "
        f"{row['decode']['seconds_median'] * 1e3:.2f} ms ({row['decode_speedup']:.2f} x static)"
    )


def _check_numbers(
    shares: Sequence[float], prompts: Sequence[int], tokens: int, repeat: int
) -> None:
    """Refuse numbers that cannot be."""
    for share in shares:
        if not 0 < share <= 1:
            raise UsageError(
                f"--resident has {share:g}, a share is above 0 and at most 1",
                hint="for example --resident 0.25,0.5",
            )
    for prompt in prompts:
        whole_number(prompt, "--prompts", hint="for example --prompts 128,512")
    whole_number(tokens, "--generate", hint="for example --generate 32")
    whole_number(repeat, "--repeat", hint="for example --repeat 3")


def _check_model(model: ModelSpec, context: int, layers: int | None) -> None:
    """Refuse more layers than a model has, or more tokens than it was made for."""
    if layers is not None and not 1 <= layers <= model.moe_layers:
        raise UsageError(
            f"--layers is {layers}, {model.name} has {model.moe_layers} MoE layers",
            hint=f"give 1 to {model.moe_layers}, or leave it out for what memory holds",
        )
    if model.context is not None and context > model.context:
        raise UsageError(
            f"--prompts and --generate make {context} tokens, {model.name} was made for "
            f"{model.context}",
            hint="give a shorter prompt",
        )


def _check_trace(trace: Path, models: Sequence[ModelSpec], prompt: int, tokens: int) -> None:
    """Refuse a trace that is damaged or fits none of the models."""
    read_trace(trace)
    for model in models:
        with suppress(TraceError):
            from_trace(trace, model, prompt, tokens + OTHER_TOKENS)
            return
    from_trace(trace, models[0], prompt, tokens + OTHER_TOKENS)


def _on_gpu(
    device: str,
    wanted: AskedModel,
    name: str,
    layers: int | None,
    context: int,
    share: float,
    options: dict[str, Any],
) -> tuple[Stage, dict[str, Any]]:
    """Set a model up on a GPU of this machine; also returns what to record of that GPU."""
    from hybrid.bench.gpu_stage import OnGpu, of_gpu

    opened = open_device(device, None, options["threads"])
    about = {"device": of_gpu(opened)}
    machine = Machine(hardware_for(name, device=opened, **options))
    hardware = machine.within(None, None, (opened.name, opened.memory())).spec
    fitting = _layers_that_fit(wanted.spec, hardware, share)
    cost = CostModel(_cut(wanted.spec, layers or fitting), hardware, FORMAT)
    return OnGpu(wanted, cost, opened, context, options["progress"]), about


def _compare(
    scene: Scene,
    name: str,
    share: float,
    repeat: int,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Give every rule its turn in every round."""
    prompt, stage = scene.prompt, scene.stage
    experts = scene.model.experts.count * scene.model.moe_layers
    prefill: dict[str, list[float]] = {rule.name: [] for rule in RULES}
    decode: dict[str, list[float]] = {rule.name: [] for rule in RULES}
    last: dict[str, Runner] = {}
    rounds = repeat + stage.uncounted
    for round_ in range(rounds):
        progress(f"{name}, {prompt} tokens, {share:.0%} resident: round {round_ + 1} of {rounds}")
        for rule in RULES:
            runner = last[rule.name] = Runner(scene, rule, int(share * experts))
            prefill_s, decode_s = runner.run()
            if round_ >= stage.uncounted:
                prefill[rule.name].append(prefill_s)
                decode[rule.name].append(median(decode_s))
    for rule in RULES:
        phase = last[rule.name].executor.timeline.phases[DECODE]
        figures = last[rule.name].executor.director.prefetcher
        yield {
            "model": name,
            "moe_layers": scene.model.moe_layers,
            "routing": scene.routing.origin,
            "prompt": prompt,
            "resident_share": share,
            "slots": last[rule.name].slots,
            "notes": _notes(last[rule.name]),
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
            "decode_predicted_s": phase.predicted.duration_s,
            "decode_least_s": _least_s(scene, last[rule.name]),
            "decode_measured_mean_s": phase.measured.duration_s,
        }


def _least_s(scene: Scene, runner: Runner) -> float:
    """Predict a decode step without any deciding, all of its experts resident on the GPU.

    No way to share experts is faster, unless the CPU takes some of theirs from a GPU that is not
    much faster than it.
    """
    phase, cost = runner.executor.timeline.phases[DECODE], scene.stage.cost
    terms, steps = phase.predicted.terms, max(1, phase.steps)
    around_s = terms[MIXER] + terms[HEAD]
    launches_s = len(phase.layers) * cost.experts.gpu_start_s
    return around_s + launches_s + phase.activated / steps * cost.experts.gpu_s(1)


def _notes(runner: Runner) -> list[str]:
    """What was slower than it could be."""
    notes = [*runner.stage.device.notes, *runner.executor.notes]
    return [f"{note.what}: {note.reason}" for note in notes]


def _ratio(baseline: list[float], ours: list[float]) -> float:
    """Median of the rounds' ratios: how many times as fast."""
    return median(b / o for b, o in zip(baseline, ours, strict=True))


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean speedup of every rule over all cases, as the geometric mean.

    The last row is of a decode step that takes no longer than the GPU needs for all of it.
    """
    bound = geometric_mean(
        row["decode"]["seconds_median"] / row["decode_least_s"]
        for row in rows
        if row["rule"] == BASELINE
    )
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
    ] + [{"rule": BOUND, "prefill_speedup": None, "decode_speedup": bound}]


def _layers_that_fit(model: ModelSpec, hardware: HardwareSpec, share: float | None = None) -> int:
    """How many MoE layers memory has room for, and the GPU's, where ``share`` of them has slots."""
    cost = CostModel(model, hardware, FORMAT)
    layer = cost.experts.bytes * model.experts.count
    places = [("memory", host.available_memory_bytes() * _MEMORY_SHARE, layer)]
    if share is not None:
        assert hardware.gpu is not None
        dense = [layer.mixer.params + layer.ffn_params for layer in model.layers]
        around = weight_bytes(2 * model.head_params, cost.dense_format)  # embedding and head
        around += STAGING * cost.experts.bytes
        room = hardware.gpu.vram_bytes.value * _VRAM_SHARE - around
        each = share * layer + weight_bytes(max(dense), cost.dense_format)
        places.append(("the GPU's memory", room, int(each)))
    for place, room, each in places:
        if room < each:
            raise UsageError(
                f"one layer of {model.name} takes {each / 2**30:.2f} GiB, "
                f"{max(0, room) / 2**30:.2f} GiB of {place} are free for it",
                hint="close other programs, or choose a smaller model",
            )
    return min(model.moe_layers, *(int(room / each) for _, room, each in places))


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


def _gpu(about: dict[str, Any]) -> str:
    """A GPU and its software in one line."""
    parts = [f"{about['name']}, {about['memory_bytes'] / 2**30:.1f} GiB"]
    software = (name for name in about if name not in ("name", "memory_bytes"))
    parts += [f"{name} {about[name]}" if about[name] else f"no {name}" for name in software]
    return ", ".join(parts)


def hybrid_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    where = f"emulated: {result['emulated']}" if "emulated" in result else _gpu(result["device"])
    lines = [f"{where}; {result['threads']} threads of this CPU"]
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
        prefill = "" if row["prefill_speedup"] is None else f"{row['prefill_speedup']:.2f}"
        lines.append(f"{row['rule']:<25}{prefill:>9}{'':>11}{row['decode_speedup']:>9.2f}")
    return "\n".join(lines)
