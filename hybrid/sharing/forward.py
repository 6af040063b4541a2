"""Times the forward passes of a placed model, and repeats one that the device had no memory for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpu_experts.device import Device
from gpu_experts.errors import DeviceFailedError, DeviceMemoryError
from hybrid.errors import bare, first_line
from hybrid.grafts import hook_before, replace_forward
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.sharing.executor import Executor
from hybrid.transformers_api import given_cache


def watch_steps(model: Any, executor: Executor, seconds: DenseSeconds) -> None:
    """Time every forward pass, and repeat one that the device had no memory for, with fewer slots.

    The clock starts at the first decoder layer: what comes before it belongs to what surrounds
    the layers. The pass is repeated from the cache as it was before it; where a cache cannot be
    cut back, the error is raised. So it is when there is no slot left to give up, or when the
    device failed: dense layers run nowhere else.
    """
    inner, device = model.forward, executor.device
    first = next(iter(getattr(model.get_decoder(), "layers", ())), None)
    prompt, context, rows = False, 1, 1

    def begin(*_: Any) -> None:
        executor.begin_step(prompt=prompt, context=context, sequences=rows)

    if first is not None:
        hook_before(first, begin, "the clock of a forward pass starts at the first decoder layer")

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal prompt, context, rows
        cache = given_cache(kwargs)
        lengths = _lengths(cache)
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows, new = (1, 1) if ids is None else ids.shape
        prompt, context = new > 1, new + max((n for n in lengths if n), default=0)
        while True:
            begin()
            try:
                output = inner(*args, **kwargs)
                break
            except RuntimeError as raised:
                if device is None or not _is_of(device, raised):
                    raise
                error = bare(raised)
            # What the broken pass held is free by now.
            _check_going_on(device, executor, error)
            executor.guard.shrink(error)
            _cut_back(cache, lengths, error)
        executor.end_step(seconds.head(rows * new))
        return output

    what = "forward passes are timed, and repeated when the device's memory runs out"
    replace_forward(model, forward, what)


def _is_of(device: Device, error: RuntimeError) -> bool:
    """Whether the device, and not the model's code, is what is wrong."""
    return device.backend.ran_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def _check_going_on(device: Device, executor: Executor, error: RuntimeError) -> None:
    """Raise ``error`` under its own name unless fewer slots may help."""
    if not device.backend.ran_out_of_memory(error):
        raise DeviceFailedError(
            f"{device.name} failed: {first_line(error)}",
            hint="start again: what this process has on the device is lost",
        ) from error
    if executor.device is None:
        raise DeviceMemoryError(
            f"no memory on {device.name}, although no expert is there: {first_line(error)}",
            asked_bytes=None,
            free_bytes=device.memory().free_bytes,
            hint="use a shorter prompt, close what else uses the device, or use vram=0",
        ) from error


def _lengths(cache: Any) -> list[int | None]:
    """Tokens in each layer of a cache; None where a state says nothing of its tokens."""
    return [
        layer.get_seq_length() if hasattr(layer, "get_seq_length") else None
        for layer in getattr(cache, "layers", ())
    ]


def _cut_back(cache: Any, before: list[int | None], error: Exception) -> None:
    """Take back what a broken pass added to a cache, or raise its error where that cannot be."""
    layers = getattr(cache, "layers", ())
    for number, (layer, length) in enumerate(zip(layers, _lengths(cache), strict=True)):
        was = before[number] if number < len(before) else 0
        if was is None or length is None:
            raise error
        if length > was:
            if getattr(layer, "is_sliding", False):
                raise error
            layer.crop(was - length)
