"""Dry runs: what a run would decide and how fast it would be, for the arguments that a run takes.

Loads neither torch nor numba.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from hybrid.ask.asked_model import AskedModel, find_model
from hybrid.ask.counts import whole_number
from hybrid.ask.names import find_hardware
from hybrid.ask.options import Options
from hybrid.ask.sizes import Size
from hybrid.errors import UsageError
from hybrid.formats.registry import packs_dense
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.machine.machines import Machine
from hybrid.planning.files import files_of, with_files
from planner.decide.policies import DEFAULT_POLICY
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.foretell.dryrun import PlanResult, dry_run
from planner.foretell.request import Request

Hardware = str | Path | HardwareSpec | Machine


def plan(
    model: str | Path | ModelSpec,
    hardware: Hardware | None = None,
    *,
    vram: Size = None,
    ram: Size = None,
    context: int | None = None,
    prompt: int | None = None,
    threads: int | None = None,
    experts: str | None = None,
    dense: str | None = None,
    popularity: str | PathLike[str] | None = None,
    policy: str = DEFAULT_POLICY,
    **simulated: Any,
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
        emulated one if vram is asked for and there is none. Or a :class:`Machine`.
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
    popularity
        A file of what earlier sessions used, or a trace (``.npz``), to begin with.
    policy
        Name of the cache policy that decides which experts stay on the GPU.
    simulated
        Other fields of ``planner.foretell.request.Request``: ``tokens``, ``batch``, ``trace``,
        ``seed``.

    Raises
    ------
    UsageError, PlannerError
        When a name is unknown, a file is damaged, or a value cannot be.
    """
    options = Options.of(
        vram=vram,
        ram=ram,
        context=context,
        threads=threads,
        experts=experts,
        dense=dense,
        popularity=popularity,
        policy=policy,
        prefix="--",
    )
    simulated = checked_counts(prompt=prompt, **simulated)
    asked = find_model(model).in_formats(experts, dense)
    machine = machine_for(asked, hardware, options)
    if machine is None:
        raise calibrations.unmeasured(Identity.of_this_machine(threads))
    result = plan_on(machine, asked, options, **simulated)
    return with_files(result, files_of(asked, dense))


def checked_counts(prompt: int | None = None, **simulated: Any) -> dict[str, Any]:
    """Return what is simulated; refuse numbers that cannot be.

    Raises
    ------
    UsageError
        Naming the first.
    """
    if prompt is not None:
        prompt = whole_number(prompt, "prompt")
    for name, least in (("tokens", 1), ("batch", 1), ("seed", 0)):
        if name in simulated:
            simulated[name] = whole_number(simulated[name], name, least=least)
    return {"prompt": prompt, **simulated}


def machine_for(asked: AskedModel, hardware: Hardware | None, options: Options) -> Machine | None:
    """Return the machine that a model is planned on: the one that is described, or this one.

    None is a machine that nobody described: this one, which was never calibrated.

    Raises
    ------
    UsageError, PlannerError
        When it is unknown, or has not what is asked for.
    """
    if hardware is None:
        return Machine.find(asked, options)
    machine = _described(hardware)
    if options.threads is not None:
        raise UsageError(
            f"threads is {options.threads}, but the rates of {machine.spec.name} are those of all "
            "its cores",
            hint="leave threads out; of this machine, 'hybrid calibrate --threads' measures fewer",
        )
    return machine.within(options.vram_bytes, options.ram_bytes)


def plan_on(
    machine: Machine,
    asked: AskedModel,
    options: Options,
    prompt: int | None = None,
    **simulated: Any,
) -> PlanResult:
    """Predict how a model that was found runs on a machine that was found.

    Parameters
    ----------
    machine
        With the memory that is in use.
    prompt, simulated
        See :func:`plan`.

    Raises
    ------
    PlannerError
        When a value cannot be, or a file is damaged or of another model.
    """
    context = options.context
    if context is None:
        context = min(Request.context, asked.spec.context or Request.context)
    request = Request(
        model=asked.spec,
        hardware=machine.spec,
        experts=asked.experts,
        dense=_dense(asked, machine),
        dense_bytes=asked.dense_bytes,
        emulated=machine.emulated,
        context=context,
        prompt=min(Request.prompt, max(1, context)) if prompt is None else prompt,
        popularity=options.popularity,
        policy=options.policy,
        **simulated,
    )
    weights = asked.weights()
    if weights is not None and request.known is not None:
        request.known.check_weights(weights, asked.spec.name, str(request.popularity))
    return dry_run(request)


def _described(hardware: Hardware) -> Machine:
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


def _dense(asked: AskedModel, machine: Machine) -> str:
    """Return the format of dense weights; an emulated GPU's that are not quantized are torch's."""
    if not machine.emulated or packs_dense(asked.dense):
        return asked.dense
    return "bf16" if automatic_dtype(asked.spec) == "bfloat16" else "f32"
