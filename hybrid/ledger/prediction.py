"""What a run on the CPU alone should take, term by term, and how far measurements are from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpu_experts.backends import first_there
from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.errors import UsageError
from hybrid.fast.decode import FastDecoder
from hybrid.ledger.alone import prompt_experts_s, prompt_loads, token_times
from hybrid.ledger.metrics import STEP, GenerationTimes, Term
from hybrid.ledger.residual import DECODE, PREFILL
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.machine.coverage import UNMEASURED, Coverage
from hybrid.model import Model
from planner.cost.step_times import Terms, extra
from planner.describe.estimate import Estimate, Source, weakest
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.describe.terms import CALL, CPU
from planner.errors import PlannerError
from planner.foretell.dryrun import OURS, estimates
from planner.foretell.request import Request

_MOST_STEPS = 128
"""Decode steps that are simulated: of longer runs those in the middle."""


@dataclass(frozen=True)
class Prediction:
    """Predicted durations of a run, term by term.

    Attributes
    ----------
    prompt
        Terms of the time to the first token; they add up to ``ttft``.
    token
        Mean terms of a decode step; they add up to ``tpot``. Empty when no step was asked for.
    coverage
        Which of them a measurement of this model's shape and formats tells.
    layers
        Every decoder layer's share of ``token``, in seconds.
    """

    prompt: dict[str, Estimate]
    token: dict[str, Estimate]
    coverage: Coverage
    layers: tuple[dict[str, float], ...]

    @property
    def ttft(self) -> Estimate:
        """Time to the first token."""
        return _sum(self.prompt)

    @property
    def tpot(self) -> Estimate:
        """Time per token after the first."""
        return _sum(self.token)


def _sum(terms: Mapping[str, Estimate]) -> Estimate:
    return sum(terms.values(), Estimate(0.0, Source.MEASURED, 0.0))


def predict(
    model: ModelSpec,
    hardware: HardwareSpec,
    *,
    experts: str,
    dense: str,
    prompt: int,
    tokens: int,
    loads: Sequence[Sequence[int]] | None = None,
    extras: Sequence[str] = (),
) -> Prediction:
    """Predict a run on the CPU alone.

    Parameters
    ----------
    model, hardware
        What runs, and where; a GPU of the machine is left alone.
    experts, dense
        Weight formats.
    prompt, tokens
        Tokens of the prompt, and new ones.
    loads
        Tokens that each expert of each MoE layer got of the prompt, ``[L, E]``, where it is known,
        or ``[P * L, E]`` of its pieces, one after the other; otherwise they are made up as for
        ``hybrid plan``.
    extras
        ``"sampling"`` where tokens are drawn and not the likeliest ones, ``"text"`` where they are
        written, too.

    Raises
    ------
    SpecError, CostError
        When lengths or formats cannot be.
    """
    machine = replace(hardware, gpu=None, link=None)
    request = Request(
        model=model,
        hardware=machine,
        experts=experts,
        dense=dense,
        context=prompt + tokens,
        prompt=prompt,
        tokens=min(max(1, tokens - 1), _MOST_STEPS),
    )
    routing = request.routing()
    if loads is not None:
        layers, choices = routing.prompt.shape
        parts = np.zeros((len(loads) // layers, layers, choices), np.int64)
        parts[:, :, : np.shape(loads)[1]] = np.reshape(loads, (len(parts), layers, -1))
        routing = replace(
            routing,
            prompt=parts.sum(axis=0),
            parts=parts if len(parts) == len(request.cost.pieces(prompt)) else None,
            source=Source.MEASURED,
            origin="as it was routed",
        )
    run = OURS.run(request, request.fit(), routing)
    later = run
    if tokens - 1 > _MOST_STEPS:  # the steps in the middle stand for all
        middle = replace(request, prompt=prompt + (tokens - 1 - _MOST_STEPS) // 2)
        later = OURS.run(middle, middle.fit(), middle.routing())
    coverage = Coverage.of(machine, model, experts, dense)
    token = estimates(request.cost, later.decode_terms(), 1) if tokens > 1 else {}
    found = Prediction(
        prompt=_doubted(estimates(request.cost, run.prefill.terms, prompt), coverage),
        token=_doubted(token, coverage),
        coverage=coverage,
        layers=later.layer_terms if tokens > 1 else (),
    )
    for name in extras:
        for terms, first in ((found.prompt, True), (found.token, False)):
            more = extra(request.cost, name, first=first)
            if terms and more.value:
                terms[CALL] += more
    return found


def _doubted(terms: dict[str, Estimate], coverage: Coverage) -> dict[str, Estimate]:
    """State the larger error of terms that were not measured for this model."""

    def doubted(name: str, term: Estimate) -> Estimate:
        if not term.value or (coverage.experts if name == CPU else coverage.parts):
            return term
        error = max(term.error or 0.0, UNMEASURED * term.value)
        return Estimate(term.value, weakest(term.source, Source.FITTED), error)

    return {name: doubted(name, term) for name, term in terms.items()}


def predicted(
    loaded: Model,
    prompt_tokens: int,
    new_tokens: int,
    *,
    threads: int | None = None,
    loads: Sequence[Sequence[int]] | None = None,
    extras: Sequence[str] = (),
) -> Prediction | None:
    """Predict a run of a loaded model on this machine; None when no calibration can be used.

    None of them can where it computes in another type than calibrations do, see
    :func:`computes_otherwise`.

    Parameters
    ----------
    loaded
        On the CPU.
    prompt_tokens, new_tokens
        Of the run.
    threads
        That it runs on.
    loads, extras
        See :func:`predict`.

    Raises
    ------
    UsageError, PlannerError
        When the model's directory is gone, or the run is none that can be predicted.
    """
    hardware = calibrations.alone(threads)
    if hardware is None or computes_otherwise(loaded) is not None:
        return None
    # As calibrations name it: a loaded network's dtype is that of its arithmetic.
    found = loaded.asked
    return predict(
        found.spec,
        hardware,
        experts=found.experts,
        dense=found.dense,
        prompt=prompt_tokens,
        tokens=new_tokens,
        loads=loads,
        extras=extras,
    )


def computes_otherwise(loaded: Model) -> str | None:
    """Say why calibrations of the CPU are not about how a model computes; None when they are.

    They are measured in what a model of its size is computed in by itself.
    """
    ours = str(loaded.network.dtype).removeprefix("torch.")
    theirs = automatic_dtype(loaded.spec)
    if ours == theirs:
        return None
    return f"the model computes in {ours}, calibrations of it are in {theirs}; --dtype auto is that"


def calibrating(
    loaded: Model, name: str, threads: int | None = None, device: str = "", *, force: bool = False
) -> str:
    """Return the command that measures this machine with a loaded model, called ``name``.

    ``threads`` and ``device`` are named where they are not what the command takes by itself, and
    no model where it has no experts to measure.
    """
    index = loaded.index
    words = ["hybrid calibrate", *([name] if index.layers else [])]
    if index.layers and index.experts_format != DEFAULT_EXPERTS:
        words += ["--experts", index.experts_format]
    if index.layers and index.dense_format is not None:
        words += ["--dense", index.dense_format]
    if not device and first_there() is not None:
        device = "cpu"
    if device:
        words += ["--device", device]
    if threads not in (None, host.default_threads()):
        words += ["--threads", str(threads)]
    if force:
        words.append("--force")
    return f"'{' '.join(words)}'"


@dataclass(frozen=True)
class CpuTerms:
    """What a run on the CPU alone consisted of, predicted and as far as it was measured.

    Attributes
    ----------
    terms, layers
        Of whole steps, and of every decoder layer of a step.
    predictions
        What was predicted from, and what would make it better; None for a batch, which is not
        predicted.
    """

    terms: tuple[Term, ...] = ()
    layers: tuple[Term, ...] = ()
    predictions: str | None = None


def cpu_terms(loaded: Model, times: GenerationTimes, threads: int, name: str) -> CpuTerms:
    """Return what a run on the CPU alone consisted of.

    Of a prompt the experts are measured, of single tokens every part, by the kernels themselves:
    what they do not see surrounds the layers.

    Parameters
    ----------
    loaded, threads
        As for :func:`predicted`; :func:`begin_run` was called before the run.
    times
        Of the run.
    name
        What the user calls the model.
    """
    if times.sequences != 1 or times.ttft_s is None:
        return CpuTerms()
    try:
        return _cpu_terms(loaded, times, times.ttft_s, threads, name)
    except (PlannerError, UsageError) as error:  # no figure is worth a run
        remedy = f"; {error.hint}" if error.hint else ""
        return CpuTerms(predictions=f"none: {error.message}{remedy}")


def _cpu_terms(
    loaded: Model, times: GenerationTimes, ttft_s: float, threads: int, name: str
) -> CpuTerms:
    loads = prompt_loads(loaded) if times.prompt_tokens > 1 else None
    found = predicted(
        loaded,
        times.prompt_tokens,
        times.new_tokens,
        threads=threads,
        loads=loads or None,
        extras=times.extras,
    )
    if (otherwise := computes_otherwise(loaded)) is not None:
        return CpuTerms(predictions=f"none: {otherwise}")
    if found is None:
        here = Identity.of_this_machine(threads)
        force = calibrations.damage(here) is not None
        command = calibrating(loaded, name, threads, force=force)
        return CpuTerms(predictions=f"none: {calibrations.missing(here)}; {command} measures it")
    fast, steps = loaded.fast.decoder, times.new_tokens - 1
    # Where some steps ran in transformers' code, what kernels and experts counted is not the run's.
    seen = fast if fast is not None and fast.watch.pieces >= steps else None
    # A prompt that the kernels computed in one step did not pass through the experts' modules.
    spent_s = None if seen is None or not loads else prompt_experts_s(loaded)

    def term(phase: str, name: str, estimate: Estimate, measured_s: float | None) -> Term:
        error = estimate.error / estimate.value if estimate.error and estimate.value else None
        return Term(phase, name, estimate.value, measured_s, error)

    terms = [term(PREFILL, STEP, found.ttft, ttft_s)]
    terms += [
        term(PREFILL, name, estimate, spent_s if name == CPU else None)
        for name, estimate in found.prompt.items()
        if estimate.value
    ]
    layers: list[Term] = []
    if steps:
        token_s = times.decode_s / steps
        measured, by_layer = ({}, ()) if seen is None else _measured(seen, token_s)
        terms.append(term(DECODE, STEP, found.tpot, token_s))
        terms += [
            term(DECODE, name, estimate, measured.get(name))
            for name, estimate in found.token.items()
            if estimate.value or measured.get(name)
        ]
        layers = [
            Term(DECODE, name, share.get(name, 0.0), seconds, layer=number)
            for number, (share, row) in enumerate(zip(found.layers, by_layer, strict=False))
            for name, seconds in row.items()
        ]
    command = calibrating(loaded, name, threads)
    return CpuTerms(tuple(terms), tuple(layers), found.coverage.advice(command))


def _measured(fast: FastDecoder, token_s: float) -> tuple[dict[str, float], tuple[Terms, ...]]:
    """Return what the one-token kernels measured, by term, and by layer and term."""
    times = token_times(fast)
    if times is None:  # no clock that kernels can read: only the whole of them is known
        return {CALL: token_s - fast.watch.seconds / fast.watch.pieces}, ()
    return times.terms | {CALL: token_s - times.duration_s}, times.layers
