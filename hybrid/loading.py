"""From a directory to a transformers model with the fast path."""

from __future__ import annotations

import traceback
from os import PathLike
from pathlib import Path
from typing import Any

import numba
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from cpu_experts.jit.workers import use_threads
from hybrid.ask.asked_model import find_model
from hybrid.ask.dtypes import DTYPES, check_dtype
from hybrid.errors import CheckpointError, UsageError, first_line
from hybrid.formats.errors import HybridError
from hybrid.grafts import fast_path_of
from hybrid.hub.fetch import directory_of
from hybrid.hub.names import hub_name
from hybrid.machine import host
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.paths import expanded
from hybrid.transformers_api import auto_class
from hybrid.weights.cache import converted_copy
from hybrid.weights.checks import Checkpoint, check_converted
from hybrid.weights.config import HybridConfig
from hybrid.weights.gguf_checkpoint import GgufCheckpoint, checkpoint_at
from hybrid.weights.source_files import few
from planner.errors import PlannerError

_OURS = ("hybrid", "cpu_experts", "gpu_experts", "planner")
_AGAIN = "copy it again, or convert the model again with 'hybrid convert'"


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
    directory = model_directory(path)
    config = HybridConfig(experts, dense, verify=verify, fast=fast)
    if directory.is_dir() and not isinstance(checkpoint_at(directory), GgufCheckpoint):
        config = config.for_loading(
            directory, experts=experts, dense=dense, verify=verify, fast=fast
        )
    if config.store is None:
        directory, config.store = converted_copy(directory, experts, dense)
    model = _load_model(directory, config, _compute_dtype(dtype, directory))
    fast_path = fast_path_of(model)
    fast_path.replace = True
    fast_path.settle(model, tell=False)
    return model, directory


def model_directory(path: str | PathLike[str]) -> Path:
    """Return where a model lies; one that is named as on the hub is downloaded if need be."""
    published = hub_name(path)
    return expanded(path) if published is None else directory_of(published)


def _load_model(directory: Path, config: HybridConfig, dtype: torch.dtype) -> Any:
    """Have transformers load a converted directory of which every file was looked at first.

    Raises
    ------
    CheckpointError
        When a file is missing or damaged, or its tensors are not the model's: transformers
        would make up what is missing.
    """
    check_converted(Checkpoint(directory))
    try:
        config_of = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        kind = auto_class(config_of) or AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            directory,
            quantization_config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {directory} is damaged: {first_line(error)}", hint=_AGAIN
        ) from error
    except Exception as error:
        if isinstance(error, HybridError | MemoryError) or _raised_below_us(error):
            raise
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot make the model that "
            f"{directory / 'config.json'} describes: {first_line(error)}",
            hint=_AGAIN,
        ) from error
    model, found = loaded
    wrong = sorted(map(str, found["missing_keys"])) or sorted(map(str, found["mismatched_keys"]))
    if wrong:
        raise CheckpointError(
            f"the weight files of {directory} lack {len(wrong)} tensors of the model: {few(wrong)}",
            hint=_AGAIN,
        )
    return model


def _raised_below_us(error: Exception) -> bool:
    """Whether our own code called what raised an error, after the frame that caught it."""
    frames = list(traceback.walk_tb(error.__traceback__))[1:]
    return any(frame.f_globals.get("__name__", "").split(".")[0] in _OURS for frame, _ in frames)


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


def set_threads(threads: int) -> int:
    """Give torch and the kernels ``threads`` threads each; the kernels' are this thread's."""
    threads = host.check_threads(threads, numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(threads)
    use_threads(threads)
    return threads
