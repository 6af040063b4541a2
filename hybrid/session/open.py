"""Opens a session: options -> machine -> model -> placed -> generation -> report.

This file walks the first half, from what a user asked for to a model that lies where it will run;
:class:`~hybrid.session.model.HybridModel` generates with it and reports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_experts.device import Device
from hybrid.ask.options import Options
from hybrid.errors import UsageError
from hybrid.fast.attach import DecodePath, FastPath
from hybrid.formats.notes import Note
from hybrid.grafts import set_fast_path
from hybrid.ledger.timeline import Timeline
from hybrid.loading import load_fast_model, set_threads
from hybrid.machine import host
from hybrid.machine.devices import choose_device, emulation_note, open_device
from hybrid.model import Model
from hybrid.session.known import known_uses, machine_with
from hybrid.sharing.budget import Budget, beyond_ram, fitted_alone
from hybrid.sharing.placement import Placement, place_model

ALONE = "none: the one-token kernels are for models on the CPU alone"
DEFAULT_CONTEXT = 4096
"""Tokens of cache that memory is kept for unless more is asked for."""


class Loaded(NamedTuple):
    """What :func:`open_model` made."""

    model: Model
    placement: Placement | None
    """How it lies on a device; None on the CPU alone."""
    threads: int
    """That compute."""
    context: int
    """Tokens of cache that memory is kept for."""
    notes: tuple[Note, ...]
    """What it said is slower or smaller than it could be."""


def open_model(path: str | PathLike[str], options: Options) -> Loaded:
    """Load a transformers model and put it where it will run; says on stderr what it decided.

    Everything that is asked for is checked before anything is loaded, even where it changes
    nothing: the same script may find a GPU elsewhere.
    """
    threads = set_threads(host.default_threads() if options.threads is None else options.threads)
    name = choose_device(options.device, options.vram_bytes)
    options = replace(options, ram_bytes=host.checked_ram(options.ram_bytes))
    _check_popularity(options.popularity)
    device = None if name is None else open_device(name, options.vram_bytes, threads)
    network, _ = load_fast_model(
        path,
        experts=options.experts,
        dense=options.dense,
        verify=options.verify,
        dtype=_dtype(options, device),
        fast=device is None,
    )
    model = Model(network)
    context = _context(options.context, model)
    placement = None
    if device is None:
        notes = (*model.fast.notes(), *_ram_notes(model, options.ram_bytes, context))
    else:
        reason = f"the model lies on a device ({name})"
        set_fast_path(network, FastPath(DecodePath(False, reason, ALONE, chosen=True)))
        placement = _place(model, device, str(path), options, context, threads)
        notes = (*model.fast.notes(), *placement.known)
    for line in (*(placement.decision if placement else ()), *notes):
        print(f"hybrid: {line}", file=sys.stderr)
    return Loaded(model, placement, threads, context, notes)


def _place(
    model: Model,
    device: Device,
    name: str,
    options: Options,
    context: int,
    threads: int,
) -> Placement:
    """Share a loaded model's experts between the CPU and a device."""
    machine = machine_with(device, model.directory, threads)
    known = known_uses(options.popularity, name, model)
    placement = place_model(
        model,
        device,
        machine.spec,
        Budget(
            options.vram_bytes,
            options.ram_bytes,
            context,
            known,
            options.record_routing,
            options.policy,
        ),
        threads=threads,
        timeline=Timeline(options.keep_timeline),
    )
    if not machine.emulated:
        return placement
    note = emulation_note(by_name=options.device is not None)
    return replace(placement, notes=(note, *placement.notes))


def _dtype(options: Options, device: Device | None) -> torch.dtype | None:
    """Return what dense layers that are not quantized compute in; None is what suits the CPU."""
    if options.dtype is not None:
        asked: torch.dtype = getattr(torch, options.dtype)
        return asked
    return None if device is None else device.dtype


def _context(asked: int | None, model: Model) -> int:
    """Return the tokens of cache to keep memory for; refuse more than the model was made for."""
    longest = model.context
    if asked is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and asked > longest:
        raise UsageError(
            f"a context of {asked} tokens is asked for, the model was made for {longest}",
            hint=f"ask for {longest} or fewer",
        )
    return asked


def _ram_notes(model: Model, ram_bytes: int | None, context: int) -> Sequence[Note]:
    """Say how many experts of a model on the CPU alone lie beyond the memory that was given."""
    beyond = None if ram_bytes is None else beyond_ram(fitted_alone(model, ram_bytes, context))
    return () if beyond is None else (beyond,)


def _check_popularity(file: Path | None) -> None:
    if file is not None and not file.is_file():
        raise UsageError(
            f"there is no popularity file {str(file)!r}",
            hint="write one with HybridModel.save_popularity, or leave it out",
        )
