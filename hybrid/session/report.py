"""Puts together the report of a loaded model's last call."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from cpu_experts.jit import hostcpu, simd_level
from gpu_experts.backends import is_emulated, name_of
from hybrid.formats.notes import Note
from hybrid.ledger.metrics import Figure, GenerationTimes, RunReport, Term
from hybrid.ledger.prediction import calibrating, cpu_terms
from hybrid.ledger.slow_paths import slow_paths
from hybrid.machine import host
from hybrid.machine.calibrations import Identity, damage
from hybrid.model import Model
from hybrid.packed.bf16_products import multiplier
from hybrid.sharing.placement import Placement


def run_report(
    model: Model,
    placement: Placement | None,
    times: GenerationTimes | None,
    *,
    name: str,
    threads: int,
    load_s: float,
    context: int | None = None,
    chosen: str | None = None,
    told: tuple[Note, ...] = (),
) -> RunReport:
    """Say what runs, how, how fast the last call was, and what ran slower than it could.

    Parameters
    ----------
    model
        What was loaded.
    placement
        How it lies on a device; None on the CPU alone.
    times
        Of the last call; None before the first.
    name, threads, load_s
        What the user calls it, how many threads compute, and how long loading took.
    context
        Tokens of cache that a device's memory is kept for.
    chosen
        How its tokens were chosen.
    told
        What was found to be slower or smaller than it could be then.
    """
    index, network = model.index, model.network
    figures = {"load_s": Figure(load_s, "s", "measured")}
    if index.layers:
        stored = Figure(index.nbytes, "bytes", "size of experts.bin, memory-mapped")
        figures = {"store_bytes": stored, **figures}
    terms: tuple[Term, ...] = ()
    layers: tuple[Term, ...] = ()
    predictions = None
    if times is not None:
        figures |= times.figures()
        if placement is None:
            found = cpu_terms(model, times, threads, name)
            terms, layers, predictions = found.terms, found.layers, found.predictions
        else:
            figures |= placement.figures()
            terms, layers = placement.terms(times), placement.by_layer()
            predictions = _predicted_from(model, placement, name, threads)
    figures["peak_memory_bytes"] = Figure(
        host.peak_memory_bytes(), "bytes", "measured by the system, mapped files included"
    )
    return RunReport(
        model=name,
        family=type(network).__name__,
        experts_format=index.experts_format if index.layers else "none to share",
        dense_format=model.dense_format,
        compute_dtype=_computed_in(model),
        decode_path=str(model.fast.path),
        simd_level=simd_level.LEVEL,
        threads=f"{threads} (torch and kernels)",
        chosen=chosen,
        speculated=None if times is None else times.speculated,
        many_tokens=many_tokens(model, shared=placement is not None) if index.layers else None,
        placement=None if placement is None else str(placement),
        figures=figures,
        terms=terms,
        layers=layers,
        predictions=predictions,
        slow_paths=_each_once(
            *slow_paths(model),
            *_damaged(threads, placement),
            *told,
            *(() if placement is None else placement.slow_paths()),
            *(() if placement is None else _beyond(context, times)),
        ),
    )


def _each_once(*paths: Note) -> tuple[Note, ...]:
    """Return what is slow, each cause once: how often it came may have been told before."""
    return tuple({path.cause: path for path in reversed(paths)}.values())[::-1]


def _computed_in(model: Model) -> str:
    """Say what dense layers compute in, and what that costs."""
    dtype: torch.dtype = model.network.dtype
    name, fast = f"{dtype}".removeprefix("torch."), model.fast.path.fast
    if dtype != torch.float32:
        bits = round(-math.log2(torch.finfo(dtype).eps)) + 1
        single = "; single tokens are computed in float32" if fast else ""
        return f"{name} (rounds every layer's results to {bits} bits{single})"
    if model.network.device.type != "cpu":
        return name
    if host.has_native_bf16():
        return f"{name} (exact; bfloat16, for which this processor has units, is faster on prompts)"
    return f"{name} (exact; without units for bfloat16 that would be slower)"


def _beyond(context: int | None, times: GenerationTimes | None) -> Iterator[Note]:
    """Say when a call took more cache than memory is kept for."""
    if context is None or times is None:
        return
    tokens = times.kept_tokens + times.prompt_tokens + times.new_tokens
    if tokens * times.sequences > context:
        batch = f" in each of {times.sequences} sequences" if times.sequences > 1 else ""
        yield Note(
            "the cache is larger than planned",
            f"the last call took {tokens} tokens{batch}, memory is kept for {context}",
            f"load with a context of {tokens * times.sequences} or more: what is missing is taken "
            "from the experts, if there is anything",
        )


def _damaged(threads: int, placement: Placement | None) -> Iterator[Note]:
    """Name the calibrations that could not be used."""
    for device in ("",) if placement is None else ("", placement.device):
        found = damage(Identity.of_this_machine(threads, device))
        if found is not None:
            yield found


def _predicted_from(model: Model, placement: Placement, name: str, threads: int) -> str:
    """Say what the predictions of a placed model are made of, and what would make them better."""
    hardware = placement.hardware
    found = f"for {hardware.name}: {hardware.summary}"
    if placement.cost.knows():
        return found
    device, emulated = name_of(placement.device) or "", is_emulated(placement.device)
    command = calibrating(model, name, threads, device, force=not emulated)
    return f"{found}; attention and dense layers from its rates only, {command} measures them"


def many_tokens(model: Model, *, shared: bool) -> str:
    """Say which products the CPU's experts take whose load is more than one token.

    ``shared`` is whether a device may have others.
    """
    where = "on the CPU " if shared else ""
    # A family's own gating runs between the kernels' projections, and between no others.
    loads = [runner.panels_from for runner in model.layers if not runner.own_gating]
    if found := [load for load in loads if load is not None]:
        least = min(found)
        return f"{where}{multiplier()} from {least} tokens on (measured), packed kernels below"
    if host.has_native_bf16():
        return f"{where}packed kernels (nothing measured found {multiplier()} faster)"
    if hostcpu.actual().units:
        return f"{where}packed kernels ({hostcpu.ENVIRONMENT_VARIABLE} hides the bfloat16 units)"
    return f"{where}packed kernels (this processor has no bfloat16 units)"
