"""From a directory to a transformers model with the fast path."""

from __future__ import annotations

import sys
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numba
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpu_experts.jit.workers import use_threads
from hybrid.ask.asked_model import subject
from hybrid.ask.counts import whole_number
from hybrid.ask.dtypes import DTYPES, automatic_dtype, check_dtype
from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.ask.sizes import checked_ram, size_in_bytes
from hybrid.errors import CheckpointError, UsageError, first_line
from hybrid.fast.attach import DecodePath, FastPath
from hybrid.formats.notes import Note
from hybrid.ledger.timeline import Timeline
from hybrid.machine import host
from hybrid.machine.devices import (
    Size,
    choose_device,
    dtype_on,
    emulation_note,
    hardware_with,
    open_device,
)
from hybrid.packed.experts import experts_of
from hybrid.session.keepsakes import weights_of
from hybrid.sharing.budget import Budget, beyond_ram, fitted_alone
from hybrid.sharing.placement import Placement, place_model
from hybrid.weights.cache import converted_copy
from hybrid.weights.config import HybridConfig
from planner.decide.popularity import Popularity, read_popularity
from planner.errors import PlannerError

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
    if dtype is None and name is not None and name != "emulated":
        dtype = dtype_on(torch.device(name))
    # Checked even where they change nothing: the same script may find a GPU elsewhere.
    ram_bytes = checked_ram(ram)
    if context is not None:
        context = whole_number(context, "context")
    if popularity is not None and not Path(popularity).is_file():
        raise UsageError(
            f"there is no popularity file {str(popularity)!r}",
            hint="write one with HybridModel.save_popularity, or leave it out",
        )
    model, directory = load_fast_model(
        path, experts=experts, dense=dense, verify=verify, dtype=dtype, fast=name is None
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(
            f"a context of {context} tokens is asked for, the model was made for {longest}",
            hint=f"ask for {longest} or fewer",
        )
    if name is None:
        beyond = None if ram_bytes is None else beyond_ram(fitted_alone(model, ram_bytes, context))
        notes = (*model.hybrid_fast.notes(), *(() if beyond is None else (beyond,)))
        return _told(Loaded(model, directory, None, context, notes))
    reason = f"the model lies on a device ({name})"
    model.hybrid_fast = FastPath(DecodePath(False, reason, ALONE, chosen=True))
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    asked = size_in_bytes(vram, "vram")
    opened = open_device(name, asked, layer.shape, threads)
    placement = place_model(
        model,
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
    if name == "emulated":
        note = emulation_note(by_name=device is not None)
        placement = replace(placement, notes=(note, *placement.notes))
    for line in placement.decision:
        print(f"hybrid: {line}", file=sys.stderr)
    notes = (*model.hybrid_fast.notes(), *placement.known)
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
    found.check_weights(weights_of(network), name, str(path))
    if found.identity is None:
        what = f"{path} does not say of which weights of {found.model} it is"
        print(f"hybrid: {what}: taken for this model's", file=sys.stderr)
    return found


def load_fast_model(
    path: str | PathLike[str],
    *,
    experts: str | None = None,
    dense: str | None = None,
    verify: bool = False,
    dtype: str | torch.dtype | None = None,
    fast: bool = True,
) -> tuple[Any, Path]:
    """Load a transformers model, converted first if need be, on the CPU.

    Takes what :meth:`HybridModel.from_pretrained` takes, and whether it may take the ``fast``
    path, which runs all of a model on the CPU; also returns the converted directory. The model
    is the caller's alone: packed modules take the places of its dense ones, which saves a copy
    of them and computes prompts faster.
    """
    directory = Path(path).expanduser()
    config = HybridConfig(experts, dense, verify=verify, fast=fast)
    if directory.is_dir():
        config = config.for_loading(
            directory, experts=experts, dense=dense, verify=verify, fast=fast
        )
    if config.store is None:
        directory, config.store = converted_copy(directory, experts or DEFAULT_EXPERTS, dense)
    model = _load_model(directory, config, _compute_dtype(dtype, directory))
    model.hybrid_fast.replace = True
    model.hybrid_fast.settle(model, tell=False)
    return model, directory


def _load_model(directory: Path, config: HybridConfig, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=config, dtype=dtype
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {directory} is damaged: {str(error).splitlines()[0]}",
            hint="copy it again, or convert the model again with 'hybrid convert'",
        ) from error


def _compute_dtype(asked: str | torch.dtype | None, directory: Path) -> torch.dtype:
    """Return what dense layers compute in: what is asked for, or what suits the model here."""
    if isinstance(asked, torch.dtype):
        if not asked.is_floating_point:
            raise UsageError(
                f"{asked} is no type to compute in", hint=f"choose one of: {', '.join(DTYPES)}"
            )
        return asked
    name = check_dtype("auto" if asked is None else asked)
    if name == "auto":
        try:
            name = automatic_dtype(subject(directory).model)
        except (PlannerError, UsageError):  # a config.json that the planner does not read
            name = automatic_dtype(None)
    found: torch.dtype = getattr(torch, name)
    return found


def load_tokenizer(directory: Path) -> Any:
    hint = "put the model's tokenizer files there (tokenizer.json, tokenizer_config.json)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} has no tokenizer that transformers can load: {first_line(error)}",
            hint=hint,
        ) from error
    # Without files transformers makes a tokenizer that knows its special tokens only.
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) < 2:
        raise CheckpointError(f"{directory} has no tokenizer", hint=hint)
    return tokenizer


def set_threads(threads: int) -> int:
    """Give torch and the kernels ``threads`` threads each; the kernels' are this thread's."""
    threads = host.check_threads(threads, numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(threads)
    use_threads(threads)
    return threads
