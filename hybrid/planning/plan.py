"""Dry runs: what a run would decide and how fast it would be, for the arguments that a run takes.

Loads neither torch nor numba.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from hybrid.ask.asked_model import Subject, subject
from hybrid.ask.counts import whole_number
from hybrid.ask.names import find_hardware, stored_weights
from hybrid.ask.sizes import at_most, checked_ram, size_in_bytes
from hybrid.errors import UsageError
from hybrid.formats.registry import packs_dense
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.machine.machines import Machine, this_machine
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.foretell.dryrun import PlanResult, dry_run
from planner.foretell.request import Request


def plan(
    model: str | Path | ModelSpec,
    hardware: str | Path | HardwareSpec | Machine | None = None,
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    context: int | None = None,
    prompt: int | None = None,
    threads: int | None = None,
    experts: str | None = None,
    dense: str | None = None,
    **options: Any,
) -> PlanResult:
    """Predict how a model runs on a machine; nothing is downloaded and no weights are needed.

    What is placed where is what ``HybridModel.from_pretrained`` decides for the same arguments.

    Parameters
    ----------
    model
        A directory, a ``config.json``, a shipped name (``Qwen3-30B-A3B``), a ``ModelSpec``, or
        ``"demo"``.
    hardware
        A shipped name (``rtx4060-laptop``), a TOML file, or a ``HardwareSpec``; this machine, as
        ``hybrid calibrate`` measured it, by default: with its GPU if that was measured, with an
        emulated one if vram is asked for and there is none. Or what :func:`machine_for` returned.
    vram, ram
        Use this much instead: bytes, or a text such as ``"6GiB"``; ``"auto"`` and None are all
        that there is, and vram 0 is the CPU alone.
    context
        Tokens of cache to reserve per sequence: 4096, or what the model was made for if less.
    prompt
        Tokens of the prompt that is predicted: 512, or the context if less. Memory is kept for
        the longest that the context admits.
    threads
        Of this machine's CPU. A described machine has the rates of all its cores, and nobody
        knows what fewer would do.
    experts, dense
        Weight formats of the converted directory. Experts are q4_0 and dense weights as in the
        checkpoint unless it was converted to something else. On a GPU dense weights are counted
        as bf16, whatever they are stored as; beside an emulated GPU, where they are not
        quantized, as what this machine's processor computes in.
    options
        Other fields of ``planner.foretell.request.Request``: ``tokens``, ``batch``, ``trace``,
        ``popularity``, ``seed``.

    Raises
    ------
    UsageError, PlannerError
        When a name is unknown, a file is damaged, or a value cannot be.
    """
    if context is not None:
        context = whole_number(context, "context")
    if prompt is not None:
        prompt = whole_number(prompt, "prompt")
    for name, least in (("tokens", 1), ("batch", 1), ("seed", 0)):
        if name in options:
            options[name] = whole_number(options[name], name, least=least)
    machine = machine_for(
        model, hardware, vram=vram, ram=ram, threads=threads, experts=experts, dense=dense
    )
    if machine is None:
        raise calibrations.unmeasured(Identity.of_this_machine(threads))
    wanted = _subject(model, experts, dense)
    if context is None:
        context = min(Request.context, wanted.model.context or Request.context)
    request = Request(
        model=wanted.model,
        hardware=machine.spec,
        experts=wanted.experts,
        dense=_dense(wanted, machine),
        emulated=machine.emulated,
        context=context,
        prompt=min(Request.prompt, max(1, context)) if prompt is None else prompt,
        **options,
    )
    weights = stored_weights(model)
    if weights is not None and request.known is not None:
        request.known.check_weights(weights, wanted.model.name, str(request.popularity))
    return dry_run(request)


def machine_for(
    model: str | Path | ModelSpec,
    hardware: str | Path | HardwareSpec | Machine | None = None,
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    threads: int | None = None,
    experts: str | None = None,
    dense: str | None = None,
) -> Machine | None:
    """Return the machine that a model is planned on; takes what :func:`plan` takes.

    None is a machine that nobody described: this one, which was never calibrated.

    Raises
    ------
    UsageError, PlannerError
        When it is unknown, or a value cannot be.
    """
    vram_bytes = size_in_bytes(vram, "--vram")
    ram_bytes = checked_ram(ram) if hardware is None else size_in_bytes(ram, "--ram")
    found: Machine | None
    if hardware is not None:
        found = _described(hardware)
        if threads is not None:
            raise UsageError(
                f"threads is {threads}, but the rates of {found.spec.name} are those of all its "
                "cores",
                hint="leave threads out; of this machine, 'hybrid calibrate --threads' measures "
                "fewer",
            )
    else:
        if threads is not None:
            threads = host.check_threads(threads, host.most_threads())
        found = this_machine(_subject(model, experts, dense), vram_bytes, threads)
    gpu = found and not found.emulated and found.spec.gpu
    if gpu and vram_bytes:
        vram_bytes = at_most(vram_bytes, int(gpu.vram_bytes.value), "vram", gpu.name)
    return None if found is None else found.with_memory(vram_bytes, ram_bytes)


def _described(hardware: str | Path | HardwareSpec | Machine) -> Machine:
    if isinstance(hardware, Machine):
        return hardware
    if isinstance(hardware, HardwareSpec):
        return Machine(hardware)
    if not isinstance(hardware, str | PathLike):
        raise UsageError(
            f"hardware is {hardware!r}, neither a name nor a file nor a description",
            hint="give a name such as rtx4060-laptop, or leave hardware out for this machine",
        )
    return Machine(find_hardware(hardware))


def _subject(model: str | Path | ModelSpec, experts: str | None, dense: str | None) -> Subject:
    """Return the model with its own formats, but for those that are asked for."""
    if isinstance(model, ModelSpec):
        found = Subject(model, {}, Request.experts, Request.dense)
    elif not isinstance(model, str | PathLike):
        raise UsageError(
            f"model is {model!r}, neither a name nor a file nor a description",
            hint='give a name such as Qwen3-30B-A3B, a directory, or "demo"',
        )
    else:
        found = subject(model)
    return replace(found, experts=experts or found.experts, dense=dense or found.dense)


def _dense(wanted: Subject, machine: Machine) -> str:
    """Return the format of dense weights; an emulated GPU's that are not quantized are torch's."""
    if not machine.emulated or packs_dense(wanted.dense):
        return wanted.dense
    return "bf16" if automatic_dtype(wanted.model) == "bfloat16" else "f32"
