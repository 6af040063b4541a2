"""From a directory to a transformers model with the fast path."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hybrid.cache import converted_copy
from hybrid.config import DEFAULT_EXPERTS, HybridConfig
from hybrid.decode import install_fast_decode
from hybrid.errors import CheckpointError
from hybrid.slow_paths import has_native_bf16


def load_fast_model(
    path: str | PathLike[str],
    *,
    experts: str | None = None,
    dense: str | None = None,
    verify: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Path]:
    """Load a transformers model, converted first if need be, and give it the fast path.

    Takes what :meth:`HybridModel.from_pretrained` takes; also returns the converted directory.
    """
    directory = Path(path).expanduser()
    config = HybridConfig(experts, dense, verify=verify)
    if directory.is_dir():
        config = config.for_loading(directory, experts=experts, dense=dense, verify=verify)
    if config.store is None:
        directory, config.store = converted_copy(directory, experts or DEFAULT_EXPERTS, dense)
    model = _load_model(directory, config, _compute_dtype() if dtype is None else dtype)
    install_fast_decode(model)
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


def _compute_dtype() -> torch.dtype:
    return torch.bfloat16 if has_native_bf16() else torch.float32
