"""The steps of opening a session: which machine, what it computes in, how the model lies there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_experts.device import Device
from hybrid.ask.options import Options
from hybrid.ask.speculate import Speculate
from hybrid.errors import UsageError
from hybrid.fast.attach import DecodePath, FastPath
from hybrid.formats.notes import Note
from hybrid.grafts import set_fast_path
from hybrid.ledger.timeline import Timeline
from hybrid.loading import set_threads
from hybrid.loop.speculation import Speculation
from hybrid.loop.timed_steps import step_seconds
from hybrid.machine import host
from hybrid.machine.devices import choose_device, emulation_note, open_device
from hybrid.model import Model
from hybrid.session.known import known_uses, machine_with
from hybrid.sharing.budget import Budget, beyond_ram, fitted_alone
from hybrid.sharing.placement import Placement, place_model

ALONE = "none: the one-token kernels are for models on the CPU alone"
DEFAULT_CONTEXT = 4096
"""Tokens of cache that memory is kept for unless more is asked for."""


class OpenMachine(NamedTuple):
    """What of this machine a session may use, checked and ready."""

    threads: int
    """That compute, torch's and the kernels'."""
    device: Device | None
    """None is the CPU alone."""
    called: str
    """What users call the device; empty without one."""
    ram_bytes: int | None
    """Of the host's memory; None is what is free."""


def open_machine(options: Options) -> OpenMachine:
    """Set the threads and open the device that options ask for.

    Raises
    ------
    UsageError
        When this machine does not have what is asked for.
    """
    threads = set_threads(host.default_threads() if options.threads is None else options.threads)
    name = choose_device(options.device, options.vram_bytes)
    ram_bytes = host.checked_ram(options.ram_bytes)
    _check_popularity(options.popularity)
    device = None if name is None else open_device(name, options.vram_bytes, threads)
    return OpenMachine(threads, device, name or "", ram_bytes)


def compute_dtype(options: Options, device: Device | None) -> torch.dtype | None:
    """Return what dense layers that are not quantized compute in; None is what suits the CPU."""
    if options.dtype is not None:
        asked: torch.dtype = getattr(torch, options.dtype)
        return asked
    return None if device is None else device.dtype


def kept_context(asked: int | None, model: Model) -> int:
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


def place(
    model: Model, here: OpenMachine, name: str, options: Options, context: int
) -> Placement | None:
    """Share a loaded model's experts between the CPU and the device; None where there is none."""
    device = here.device
    if device is None:
        return None
    reason = f"the model lies on a device ({here.called})"
    set_fast_path(model.network, FastPath(DecodePath(False, reason, ALONE, chosen=True)))
    machine = machine_with(device, model.directory, here.threads)
    known = known_uses(options.popularity, name, model)
    placement = place_model(
        model,
        device,
        machine.spec,
        Budget(
            options.vram_bytes,
            here.ram_bytes,
            context,
            known,
            options.record_routing,
            options.policy,
        ),
        threads=here.threads,
        timeline=Timeline(options.keep_timeline),
    )
    if not machine.emulated:
        return placement
    note = emulation_note(by_name=options.device is not None)
    return replace(placement, notes=(note, *placement.notes))


def notes_alone(model: Model, here: OpenMachine, context: int) -> Sequence[Note]:
    """Say how many experts of a model on the CPU alone lie beyond the memory that was given."""
    if here.ram_bytes is None:
        return ()
    beyond = beyond_ram(fitted_alone(model, here.ram_bytes, context))
    return () if beyond is None else (beyond,)


def undrafted(placement: Placement | None, asked: Speculate) -> Iterator[Note]:
    """Say that no tokens are drafted beside a device, where somebody asked for drafts."""
    if placement is not None and asked.source not in ("auto", "off"):
        yield Note(
            "no tokens are drafted",
            f"the model lies on {placement.device}, where steps of several tokens are prompts",
            "load it on the CPU alone (vram 0), or leave speculate out",
        )


def open_speculation(
    model: Model, placement: Placement | None, asked: Speculate
) -> Speculation | None:
    """Return what drafts tokens; None where nothing does. Times steps of a few tokens for it."""
    if placement is not None or asked.off:
        return None
    timed = step_seconds(model.network) if asked.count is None else {}
    model.fast.refused.clear()
    return Speculation(asked, timed)


def _check_popularity(file: Path | None) -> None:
    if file is not None and not file.is_file():
        raise UsageError(
            f"there is no popularity file {str(file)!r}",
            hint="write one with HybridModel.save_popularity, or leave it out",
        )
