"""Measures this machine with the runtime's own code, for the planner to predict with.

A replica of the wanted model's first layers runs prompts and single tokens
(:mod:`~hybrid.measure.replica`); its routed experts run at all loads, the memory and the disk
are read (:mod:`~hybrid.measure.experts`); the device is measured where one is given
(:mod:`~hybrid.measure.device`). Time is limited: what does not fit is left out, and
named.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

from gpu_experts.errors import GpuExpertsError
from hybrid.ask.asked_model import AskedModel, find_model
from hybrid.errors import UsageError, first_line
from hybrid.formats.block import Block
from hybrid.ledger.prediction import predicted
from hybrid.loading import set_threads
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.coverage import Coverage
from hybrid.measure.describe import Measured, ModelParts, to_spec
from hybrid.measure.experts import (
    Budget,
    ExpertTimes,
    bare_layers,
    disk_times,
    layer_times,
    read_rates,
)
from hybrid.measure.interference import Others, Turns
from hybrid.measure.replica import Replica, shortened
from hybrid.measure.terms_of_step import Pass
from hybrid.packed.experts import experts_of
from hybrid.paths import make_cache_folder, temporary_folder
from planner.describe.hardware import HardwareSpec

if TYPE_CHECKING:
    from gpu_experts.device import Device
    from hybrid.measure.shared import Placed

__all__ = ["calibrate", "covers", "hardware_for", "predicted"]

LIMIT_S = 40.0
"""What measuring takes at most. Making and loading the replica comes before it, about 10 s; so
does compiling the kernels when they are used for the first time."""
STANDARD = "Qwen3-30B-A3B"
"""The model whose shape is measured when none is named."""
OTHER_SHAPES = ((4096, 14336, 8, 2), (2048, 1408, 64, 6))
"""Experts measured besides it: hidden, intermediate, count, top_k of Mixtral-8x7B and
DeepSeek-V2-Lite."""
PROMPTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
DECODED_AFTER = (8, 32, 128, 512, 2048)
DECODED = 26
"""New tokens after those prompts."""
DRAWN = 12
"""New tokens that are drawn, and as many that are written, or neither."""
TURNS = (3, 12)
"""Times that each prompt is run: the most only of small models, which take no time."""
QUICK_S = 10.0
"""Turns beyond the least end after this."""

Progress = Callable[[str], None]


def calibrate(
    model: str | Path | None = None,
    *,
    experts: str | None = None,
    dense: str | None = None,
    device: Device | None = None,
    threads: int | None = None,
    progress: Progress = lambda what: None,
    limit_s: float = LIMIT_S,
) -> HardwareSpec:
    """Measure this machine and return what was found; see :func:`hardware_for` for keeping it.

    Parameters
    ----------
    model
        A directory, a ``config.json`` or a shipped name whose shape is measured; a standard one
        by default.
    experts, dense
        Weight formats: those of a converted directory; ``"q4_0"`` and what the checkpoint has
        for anything else.
    device
        An accelerator to measure, too; opened and closed here.
    threads
        For torch and the kernels, as the runtime chooses them unless given.
    progress
        Called with a line about what is measured next.
    limit_s
        What measuring may take.

    Raises
    ------
    UsageError, UnsupportedModelError, PlannerError
        When the model is unknown or its code cannot be run, or a value cannot be used.
    """
    wanted = find_model(STANDARD if model is None else model, experts, dense)
    if not wanted.spec.moe_layers:
        raise UsageError(
            f"{wanted.spec.name} has no experts, whose speed is what is measured",
            hint="name a model that has some, or none for a standard one",
        )
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    home = make_cache_folder()
    with temporary_folder("calibrate") as folder:
        progress(f"making some layers of {wanted.spec.name} with random weights")
        replica = _replica(wanted, folder)
        replica.generate(8, 8)
        budget = Budget(limit_s)
        progress("reading from memory")
        reads = read_rates(threads, budget.part(0.1))
        progress("reading from disk")
        found = Measured(reads, disk_times(home, budget.part(0.1)))
        if device is not None:
            from hybrid.measure.device import device_times

            progress(f"measuring {device.name}")
            top_k = wanted.spec.experts.top_k
            found.device = device_times(
                device, experts_of(replica.network), top_k, budget.part(0.2)
            )
        parts = (0.8 if model else 0.7) * (0.25 if device else 1.0)
        again = 0.1 if device or not model else 0.8
        shares = parts, again  # the rest is the device's and the other shapes'
        _measure_alone(found, replica, wanted, budget, shares, progress)
        del replica
        _let_go()
        identity = Identity.of_this_machine(threads, device.name if device else "")
        if device is not None:
            so_far = to_spec(found, identity, datetime.now(UTC))
            part = budget.part(0.9 if model else 0.75)
            _measure_placed(found, Path(folder), wanted, device, so_far, threads, part, progress)
            _let_go()
        for hidden, intermediate, count, top_k in OTHER_SHAPES if model is None else ():
            if budget.left_s() < 4:
                found.left_out.append(f"experts of {hidden} x {intermediate}")
                continue
            progress(f"running experts of {hidden} x {intermediate}")
            shape = Block(hidden=hidden, intermediate=intermediate, format=wanted.experts)
            layers = bare_layers(shape, count)
            found.experts.append(layer_times(layers, shape, top_k, budget.part(0.5)))
    return to_spec(found, identity, datetime.now(UTC))


def hardware_for(
    model: str | Path | None = None,
    *,
    force: bool = False,
    calmer: bool = True,
    **options: Any,
) -> HardwareSpec:
    """Return this machine with ``model``'s shape measured, now if it was not before.

    Parameters
    ----------
    model
        As of :func:`calibrate`; any calibration will do for None.
    force
        Measure even though it was before.
    calmer
        Measure again, too, what other programs disturbed, and keep the less disturbed one. A
        machine that is never calm is measured at every call then.
    options
        Those of :func:`calibrate`.

    Raises
    ------
    UsageError
        When the calibration that is there is damaged, unless by ``force``; and as
        :func:`calibrate`.
    """
    device = options.get("device")
    identity = Identity.of_this_machine(options.get("threads"), device.name if device else "")
    try:
        old = calibrations.load(identity)
    except UsageError:
        if not force:
            raise
        old = None
    known = old is not None and (model is None or covers(old, _wanted(model, options)))
    if old is None or not known or force:
        spec = calibrations.added(old, calibrate(model, **options))
    elif not calmer or not (before := _disturbed(old, model, options)):
        return old
    else:
        new = calibrate(model, **options)
        better = _disturbed(new, model, options) < before
        spec = calibrations.added(old, new) if better else calibrations.added(new, old)
    calibrations.save(spec, identity)
    return spec


def covers(spec: HardwareSpec, wanted: AskedModel) -> bool:
    """Whether a calibration has measured this model's shape and formats."""
    return Coverage.of(spec, wanted.spec, wanted.experts, wanted.dense).whole


def _wanted(model: str | Path, options: Mapping[str, Any]) -> AskedModel:
    return find_model(model, options.get("experts"), options.get("dense"))


def _disturbed(spec: HardwareSpec, model: str | Path | None, options: Mapping[str, Any]) -> float:
    if model is None:
        return calibrations.disturbed([*spec.points, *spec.terms])
    wanted = _wanted(model, options)
    return Coverage.of(spec, wanted.spec, wanted.experts, wanted.dense).disturbed


def _replica(wanted: AskedModel, folder: Path) -> Replica:
    settings = shortened(wanted.config, wanted.spec, wanted.experts, wanted.dense)
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        return Replica(wanted.spec, settings, folder, wanted.experts, wanted.dense)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{wanted.spec.name} ({wanted.spec.family}) cannot be made with random weights: "
            f"{type(error).__name__}: {error}",
            hint="name a text model whose family transformers knows, or none",
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()


def _prompts(context: int | None) -> dict[int, int]:
    """Prompts that a model of this ``context`` can read, and how many new tokens after each.

    Where the context cuts the list off, the longest is one that just fits.
    """
    new_tokens = {prompt: DECODED if prompt in DECODED_AFTER else 1 for prompt in PROMPTS}
    if context is None:
        return new_tokens
    fitting = {prompt: new for prompt, new in new_tokens.items() if prompt + new <= context}
    if len(fitting) < len(new_tokens):
        fitting.setdefault(context - 1, 1)
    return fitting


def _measure_alone(
    found: Measured,
    replica: Replica,
    wanted: AskedModel,
    budget: Budget,
    shares: tuple[float, float],
    progress: Progress,
) -> None:
    """Measure the replica on the CPU: its experts, all its parts, and its experts again.

    ``shares`` are of the budget that is left, for the parts and for the experts' second turn.
    """
    runners = experts_of(replica.network)
    top_k = wanted.spec.experts.top_k

    def time_experts(share: float) -> ExpertTimes:
        for runner in runners:
            runner.panels_from = None
        layers = [runner.blocks for runner in runners]
        return layer_times(layers, runners[0].shape, top_k, budget.part(share), runners)

    progress("running experts")
    found.experts.append(time_experts(0.15))
    for runner in runners:
        runner.panels_from = found.experts[0].panels_from()
    prompts = _prompts(replica.model.context)
    runs = _run(replica, prompts, budget.part(shares[0]), progress)
    progress("running experts again, for a machine's speed drifts")
    found.experts[0] = found.experts[0].joined(time_experts(shares[1]))
    progress("drawing and writing tokens")
    parts = [
        *replica.parts({prompt: turns.kept() for prompt, turns in runs.items()}),
        *replica.extras(DRAWN, 2),
    ]
    disturbed = fmean(turns.disturbed() for turns in runs.values())
    found.parts.append(
        ModelParts(wanted.spec.family, wanted.experts, wanted.dense, parts, disturbed)
    )
    if missing := [prompt for prompt in prompts if prompt not in runs]:
        found.left_out.append(f"prompts of {', '.join(map(str, missing))}")


def _let_go() -> None:
    """Free networks that nothing uses any more, with their memory on a device and their files.

    Hooks and replaced methods tie them into cycles, which only a collection frees; where that is
    switched off while a model is loaded, and then frozen, they would stay for good.
    """
    gc.collect()


def _measure_placed(
    found: Measured,
    folder: Path,
    wanted: AskedModel,
    device: Device,
    hardware: HardwareSpec,
    threads: int,
    budget: Budget,
    progress: Progress,
) -> None:
    """Measure the replica in ``folder`` where it shares its experts with ``device``.

    What cannot be is noted in ``found``, with the reason.
    """
    from hybrid.measure.shared import Placed, UnmeasuredError

    progress(f"putting the layers on {device.name}")
    every = _prompts(wanted.spec.context)
    # Few lengths, so that there is time for long ones: what a device takes grows evenly.
    prompts = {prompt: new for prompt, new in every.items() if new > 1 or prompt == PROMPTS[0]}
    context = max(prompt + new for prompt, new in prompts.items())
    try:
        placed = Placed(folder, wanted.spec, device, hardware, context, threads)
        try:
            runs = _run(placed, prompts, budget, progress)
            parts = [
                *placed.parts({prompt: turns.kept() for prompt, turns in runs.items()}),
                *placed.extras(DRAWN, 2),
            ]
        finally:
            placed.close()
    except Exception as error:
        told = isinstance(error, UnmeasuredError | UsageError | GpuExpertsError)
        if not (told or device.backend.ran_out_of_memory(error)):
            raise
        what = f"attention and dense layers on {device.name}"
        found.refused.append(f"{what} ({first_line(error)})")
        device.close()
        return
    disturbed = fmean(turns.disturbed() for turns in runs.values())
    top_k = wanted.spec.experts.top_k
    found.placed.append(
        ModelParts(placed.family, wanted.experts, placed.dense_format, parts, disturbed, top_k)
    )
    if missing := [prompt for prompt in prompts if prompt not in runs]:
        found.left_out.append(f"prompts of {', '.join(map(str, missing))} on {device.name}")


def _run(
    replica: Replica | Placed, prompts: Mapping[int, int], budget: Budget, progress: Progress
) -> dict[int, Turns[list[Pass]]]:
    """Generate after prompts of all lengths, several times while time allows.

    The shortest prompts, up to the first that tokens are decoded after, are run anyway, and none
    for which there is no time. What other programs disturbed is run again while there is.
    ``prompts`` says how many new tokens come after each.
    """
    others = Others()
    runs: dict[int, Turns[list[Pass]]] = {}
    took_s: dict[int, float] = {}
    last_s = 0.0
    begun_s = budget.left_s()
    for turn in range(TURNS[1]):
        enough = turn >= TURNS[0] and begun_s - budget.left_s() > QUICK_S
        for prompt in prompts:
            if enough and not (prompt in runs and runs[prompt].wanting(TURNS[0] - 1)):
                continue
            expected_s = took_s.get(prompt, 2.5 * last_s)
            if expected_s > budget.left_s() and prompt > DECODED_AFTER[0]:
                break
            progress(f"prompts of {prompt} tokens, turn {turn + 1}")
            before_s = budget.left_s()
            turns = runs.setdefault(prompt, Turns(others))
            turns.measure(partial(replica.generate, prompt, prompts[prompt]))
            last_s = took_s[prompt] = before_s - budget.left_s()
    return runs
