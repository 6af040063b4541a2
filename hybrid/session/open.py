"""From what a user asked for to a loaded model, placed where it will run."""

from __future__ import annotations

import sys
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_experts.device import Device
from hybrid.ask.asked_model import subject
from hybrid.ask.counts import whole_number
from hybrid.ask.dtypes import check_dtype
from hybrid.ask.sizes import checked_ram, size_in_bytes
from hybrid.errors import UsageError
from hybrid.fast.attach import DecodePath, FastPath
from hybrid.formats.notes import Note
from hybrid.grafts import set_fast_path
from hybrid.ledger.timeline import Timeline
from hybrid.loading import load_fast_model
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.machine.devices import Size, choose_device, emulation_note, open_device
from hybrid.machine.machines import with_emulated
from hybrid.measure.calibrate import hardware_for
from hybrid.model import Model
from hybrid.packed.experts import experts_of
from hybrid.sharing.budget import Budget, beyond_ram, fitted_alone
from hybrid.sharing.placement import Placement, place_model
from planner.decide.popularity import Popularity, read_popularity
from planner.describe.hardware import HardwareSpec

ALONE = "none: the one-token kernels are for models on the CPU alone"
DEFAULT_CONTEXT = 4096
"""Tokens of cache that memory is kept for unless more is asked for."""


class Loaded(NamedTuple):
    """What :func:`load_model` made."""

    network: Any
    directory: Path
    """The converted one."""
    placement: Placement | None
    """How it lies on a device; None on the CPU alone."""
    context: int
    """Tokens of cache that memory is kept for."""
    notes: tuple[Note, ...]
    """What it said is slower or smaller than it could be."""


def load_model(
    path: str | PathLike[str],
    *,
    experts: str | None,
    dense: str | None,
    verify: bool,
    dtype: str | torch.dtype | None,
    device: str | int | torch.device | None,
    vram: Size,
    ram: Size,
    context: int | None,
    popularity: str | PathLike[str] | None,
    threads: int,
    keep_timeline: bool,
    record_routing: bool,
) -> Loaded:
    """Load a transformers model and put it where it will run; says on stderr what it decided.

    Takes what :meth:`HybridModel.from_pretrained` takes, and checks it before anything else.
    """
    name = choose_device(device, vram)
    if isinstance(dtype, str):
        dtype = None if check_dtype(dtype) == "auto" else dtype
    # Checked even where they change nothing: the same script may find a GPU elsewhere.
    ram_bytes = checked_ram(ram)
    if context is not None:
        context = whole_number(context, "context")
    if popularity is not None and not Path(popularity).is_file():
        raise UsageError(
            f"there is no popularity file {str(popularity)!r}",
            hint="write one with HybridModel.save_popularity, or leave it out",
        )
    asked = size_in_bytes(vram, "vram")
    opened = None if name is None else open_device(name, asked, threads)
    if dtype is None and opened is not None:
        dtype = opened.dtype
    model, directory = load_fast_model(
        path, experts=experts, dense=dense, verify=verify, dtype=dtype, fast=opened is None
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(
            f"a context of {context} tokens is asked for, the model was made for {longest}",
            hint=f"ask for {longest} or fewer",
        )
    if opened is None:
        beyond = (
            None
            if ram_bytes is None
            else beyond_ram(fitted_alone(Model(model), ram_bytes, context))
        )
        notes = (*Model(model).fast.notes(), *(() if beyond is None else (beyond,)))
        return _told(Loaded(model, directory, None, context, notes))
    reason = f"the model lies on a device ({name})"
    set_fast_path(model, FastPath(DecodePath(False, reason, ALONE, chosen=True)))
    placement = place_model(
        Model(model),
        opened,
        hardware_with(opened, directory, threads),
        Budget(
            asked,
            ram_bytes,
            context,
            known_uses(popularity, str(path), model),
            record_routing,
        ),
        threads=threads,
        timeline=Timeline(keep_timeline),
    )
    if opened.backend.emulated:
        note = emulation_note(by_name=device is not None)
        placement = replace(placement, notes=(note, *placement.notes))
    for line in placement.decision:
        print(f"hybrid: {line}", file=sys.stderr)
    notes = (*Model(model).fast.notes(), *placement.known)
    return _told(Loaded(model, directory, placement, context, notes))


def _told(loaded: Loaded) -> Loaded:
    """Say on stderr what is known to be slower or smaller than it could be."""
    for note in loaded.notes:
        print(f"hybrid: {note}", file=sys.stderr)
    return loaded


def known_uses(file: str | PathLike[str] | None, name: str, network: Any) -> Popularity | None:
    """Return the uses of experts that a popularity file or a routing trace (``.npz``) counts.

    Parameters
    ----------
    name, network
        The model that they have to be of.

    Raises
    ------
    TraceError
        When it is damaged or of another model.
    """
    if file is None:
        return None
    path = Path(file)
    if path.suffix == ".npz":
        return Popularity.of_trace(path, name, len(experts_of(network)[0].blocks))
    found = read_popularity(path)
    found.check_weights(Model(network).weights, name, str(path))
    if found.identity is None:
        what = f"{path} does not say of which weights of {found.model} it is"
        print(f"hybrid: {what}: taken for this model's", file=sys.stderr)
    return found


def hardware_with(device: Device, directory: Path, threads: int) -> HardwareSpec:
    """Return what this machine does how fast, with ``device`` as its GPU.

    A real device is measured with the model's shape when it is used for the first time, or what
    was measured is damaged, which takes about a minute; what other programs disturbed is taken as
    it is, until ``hybrid calibrate`` measures it again. So may an emulated one be, by ``hybrid
    calibrate``; else it is taken for that of ``EMULATED_AS``, beside this machine's CPU where that
    was calibrated.
    """
    if device.backend.emulated:
        return with_emulated(subject(directory), threads, device.name)
    damaged = calibrations.damage(Identity.of_this_machine(threads, device.name))
    if damaged is not None:
        _say(f"{damaged.reason}: measuring anew")
    return hardware_for(
        directory,
        force=damaged is not None,
        calmer=False,
        device=device,
        threads=threads,
        progress=_say,
    )


def _say(text: str) -> None:
    print(f"hybrid: {text}", file=sys.stderr)
