"""From a directory to a transformers model with the fast path."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numba
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cpu_experts.jit.workers import use_threads
from hybrid.ask.asked_model import find_model
from hybrid.ask.dtypes import DTYPES, check_dtype
from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.errors import CheckpointError, UsageError, first_line
from hybrid.grafts import fast_path_of
from hybrid.hub import directory_of, hub_name
from hybrid.machine import host
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.transformers_api import auto_class
from hybrid.weights.cache import converted_copy
from hybrid.weights.config import HybridConfig
from planner.errors import PlannerError


def load_fast_model(
    path: str | PathLike[str],
    *,
    experts: str | None = None,
    dense: str | None = None,
    verify: bool = False,
    dtype: str | torch.dtype | None = None,
    fast: bool = True,
) -> tuple[Any, Path]:
    """Load a transformers model, downloaded and converted first if need be, on the CPU.

    Takes what :meth:`HybridModel.from_pretrained` takes, and whether it may take the ``fast``
    path, which runs all of a model on the CPU; also returns the converted directory. The model
    is the caller's alone: packed modules take the places of its dense ones, which saves a copy
    of them and computes prompts faster.
    """
    published = hub_name(path)
    directory = Path(path).expanduser() if published is None else directory_of(published)
    config = HybridConfig(experts, dense, verify=verify, fast=fast)
    if directory.is_dir():
        config = config.for_loading(
            directory, experts=experts, dense=dense, verify=verify, fast=fast
        )
    if config.store is None:
        directory, config.store = converted_copy(directory, experts or DEFAULT_EXPERTS, dense)
    model = _load_model(directory, config, _compute_dtype(dtype, directory))
    fast_path = fast_path_of(model)
    fast_path.replace = True
    fast_path.settle(model, tell=False)
    return model, directory


def _load_model(directory: Path, config: HybridConfig, dtype: torch.dtype) -> Any:
    kind = auto_class(AutoConfig.from_pretrained(directory)) or AutoModelForCausalLM
    try:
        return kind.from_pretrained(directory, quantization_config=config, dtype=dtype)
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
            name = automatic_dtype(find_model(directory).spec)
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
