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
from hybrid.decode import DecodePath, install_fast_decode
from hybrid.devices import Size, hardware_with, open_device, size_in_bytes, wants_vram
from hybrid.errors import CheckpointError
from hybrid.placement import Budget, Placement, place_model
from hybrid.slow_paths import has_native_bf16
from hybrid.timeline import Timeline

DEFAULT_CONTEXT = 4096
"""Tokens of cache that memory is kept for unless more is asked for."""


def load_placed_model(
    path: str | PathLike[str],
    name: str,
    *,
    vram: Size = None,
    ram: str | int | None = None,
    context: int | None = None,
    threads: int,
    timeline: Timeline | None = None,
    **options: Any,
) -> tuple[Any, Path, Placement]:
    """Load a model and share it with the device called ``name``.

    Takes what :meth:`HybridModel.from_pretrained` takes.
    """
    if options.get("dtype") is None and name != "emulated":
        options["dtype"] = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    model, directory = load_fast_model(path, fast=False, **options)
    model.hybrid_decode = DecodePath(False, f"the experts are shared with {name}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    asked = size_in_bytes(vram, "vram") if vram is not None and wants_vram(vram) else None
    experts = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    device = open_device(name, asked, experts.shape, threads)
    placement = place_model(
        model,
        device,
        hardware_with(device),
        Budget(asked, None if ram is None else size_in_bytes(ram, "ram"), context),
        threads=threads,
        timeline=timeline,
    )
    return model, directory, placement


def load_fast_model(
    path: str | PathLike[str],
    *,
    experts: str | None = None,
    dense: str | None = None,
    verify: bool = False,
    dtype: torch.dtype | None = None,
    fast: bool = True,
) -> tuple[Any, Path]:
    """Load a transformers model, converted first if need be, and give it the fast path.

    Takes what :meth:`HybridModel.from_pretrained` takes, and whether to install the ``fast``
    path, which runs all of a model on the CPU; also returns the converted directory.
    """
    directory = Path(path).expanduser()
    config = HybridConfig(experts, dense, verify=verify)
    if directory.is_dir():
        config = config.for_loading(directory, experts=experts, dense=dense, verify=verify)
    if config.store is None:
        directory, config.store = converted_copy(directory, experts or DEFAULT_EXPERTS, dense)
    model = _load_model(directory, config, _compute_dtype() if dtype is None else dtype)
    if fast:
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
