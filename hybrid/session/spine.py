"""A session from end to end: options -> machine -> model -> placed -> generation -> report.

:func:`open_session` walks the first four, :func:`generate` and :func:`report` the last two. How a
step is done lies in the files that they call; users hold a
:class:`~hybrid.session.model.HybridModel`.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch

from hybrid.ask.options import Options
from hybrid.fast.prompt import prompts_told
from hybrid.formats.notes import Note
from hybrid.grafts import replaced_settings
from hybrid.ledger.alone import begin_run
from hybrid.ledger.metrics import RunReport
from hybrid.ledger.slow_paths import refusals
from hybrid.loading import load_fast_model, set_threads
from hybrid.loop.loop import Loop
from hybrid.loop.prepared import Prepared, Preparing
from hybrid.loop.speculation import Drafts, Speculation
from hybrid.model import Model
from hybrid.session.generation import Generation
from hybrid.session.generation_options import (
    left_out,
    loop_options,
    sampling_told,
    text_settings,
)
from hybrid.session.generation_stream import GenerationStream, Stopped
from hybrid.session.opening import (
    compute_dtype,
    kept_context,
    notes_alone,
    open_machine,
    open_speculation,
    place,
    undrafted,
)
from hybrid.session.own_loop import with_own_loop, with_penalties
from hybrid.session.report import run_report
from hybrid.sharing.placement import Placement
from hybrid.transformers_api import given_cache


@dataclass(frozen=True, eq=False)
class Session:
    """A model that lies where it will run.

    Attributes
    ----------
    name
        What the user calls it.
    model
        What is known of it.
    placement
        How it lies on a device; None on the CPU alone.
    threads
        That compute.
    context
        Tokens of cache that memory is kept for.
    notes
        What was said to be slower or smaller than it could be.
    speculation
        What drafts tokens; None beside a device.
    load_s
        Seconds that it took to load.
    """

    name: str
    model: Model
    placement: Placement | None
    threads: int
    context: int
    notes: tuple[Note, ...]
    speculation: Speculation | None = None
    load_s: float = 0.0


def open_session(path: str | PathLike[str], options: Options, name: str) -> Session:
    """Load a transformers model and put it where it will run; says on stderr what it decided.

    Everything that is asked for is checked before anything is loaded, even where it changes
    nothing: the same script may find a GPU elsewhere.
    """
    start_s = time.perf_counter()
    machine = open_machine(options)
    network, _ = load_fast_model(
        path,
        experts=options.experts,
        dense=options.dense,
        verify=options.verify,
        dtype=compute_dtype(options, machine.device),
        fast=machine.device is None,
    )
    model = Model(network)
    context = kept_context(options.context, model)
    placement = place(model, machine, str(path), options, context)
    apart = notes_alone(model, machine, context) if placement is None else placement.known
    apart = (*apart, *undrafted(placement, options.speculate))
    notes = (*model.fast.notes(), *apart, *left_out(network.generation_config))
    _say(*(placement.decision if placement else ()), *notes)
    session = Session(name, model, placement, machine.threads, context, notes)
    refused = _warm_up(session)
    _say(*refused)
    return replace(
        session,
        notes=(*notes, *refused),
        speculation=open_speculation(model, placement, options.speculate),
        load_s=time.perf_counter() - start_s,
    )


def generate(
    session: Session,
    ids: torch.Tensor,
    stream: GenerationStream,
    settings: Any = None,
    **options: Any,
) -> Generation:
    """Run a loop after ``ids`` ``[B, T]``, ours or transformers'; a ``stream`` may leave it.

    ``stream`` knows what there is of the generation also where an error or an interrupt ends it.
    ``settings`` take the place of the model's own.
    """
    network = session.model.network
    if settings is not None:
        with replaced_settings(network, settings):
            return generate(session, ids, stream, **options)
    on_prompt = stream.before_first(options.pop("on_prompt", None))
    told = nullcontext() if on_prompt is None else prompts_told(network, on_prompt)
    drafts = drafts_of(session, ids)
    settled = loop_options(network, with_penalties(options, ids.shape[1]), stream)
    if settled.get("streamer") is not None:
        settled = with_own_loop(network, settled, Loop(stream, drafts))
    cache = given_cache(options)
    kept = 0 if cache is None else int(cache.get_seq_length())
    set_threads(session.threads)
    if session.placement is not None:
        session.placement.begin_run()
    else:
        begin_run(session.model, ids.shape[1] - kept)
    session.model.fast.refused.clear()
    chosen = sampling_told(network.generation_config, options)
    stream.start(ids, chosen=chosen, kept=kept, drafts=drafts)
    result = None
    with suppress(Stopped), told:
        result = network.generate(ids.to(network.device), **settled)
        stream.take(result)
    return stream.generation(result)


def prepare(
    session: Session,
    ids: torch.Tensor,
    stream: GenerationStream,
    settings: Any = None,
    **options: Any,
) -> tuple[Prepared | None, str]:
    """Return what :func:`generate` would run, and how its tokens are chosen, in words.

    None for a call that is not a loop of ours over one sequence on the CPU.
    """
    network = session.model.network
    if settings is not None:
        with replaced_settings(network, settings):
            return prepare(session, ids, stream, **options)
    chosen, preparing = sampling_told(network.generation_config, options), Preparing()
    settled = loop_options(network, with_penalties(options, ids.shape[1]), stream)
    if session.placement is not None or settled.pop("streamer", None) is None:
        return None, chosen
    settled = with_own_loop(network, settled, preparing)
    if settled.get("custom_generate") is preparing:
        network.generate(ids, **settled)
    return preparing.found, chosen


def drafts_of(session: Session, ids: torch.Tensor) -> Drafts | None:
    """Return what drafts tokens after ``ids`` ``[B, T]``; None where nothing may."""
    if session.speculation is None or len(ids) != 1:
        return None
    return session.speculation.begin(ids[0].tolist())


def report(session: Session, last: Generation | None) -> RunReport:
    """Say what runs, how, how fast the last call was, and what ran slower than it could."""
    return run_report(
        session.model,
        session.placement,
        None if last is None else last.times,
        chosen=None if last is None else last.chosen,
        name=session.name,
        threads=session.threads,
        load_s=session.load_s,
        context=session.context,
        told=session.notes,
    )


def _warm_up(session: Session) -> tuple[Note, ...]:
    """Run a few tokens, so that loading the kernels counts as loading and not as TTFT.

    Returns why plain steps go past the fast path, if they do: known before any text is written.
    """
    two: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    two |= {"stop_strings": None, "exponential_decay_length_penalty": None}
    own = text_settings(session.model.network.generation_config)
    generate(session, torch.zeros(1, 2, dtype=torch.long), GenerationStream(), own, **two)
    if session.placement is not None and session.placement.executor is not None:
        session.placement.executor.forget_counts()
    fast = session.model.fast
    return tuple(refusals(fast)) if fast.path.fast and fast.refused else ()


def _say(*notes: Any) -> None:
    for note in notes:
        print(f"hybrid: {note}", file=sys.stderr)
