"""Every forward pass of a placed model: timed, and repeated when the device's memory runs out."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hybrid.errors import bare
from hybrid.sharing.dense_seconds import DenseSeconds
from hybrid.sharing.executor import Executor


def watch_steps(model: Any, executor: Executor, seconds: DenseSeconds) -> None:
    """Time every forward pass, and repeat one that the device had no memory for, with fewer slots.

    The clock starts at the first decoder layer: what comes before it belongs to what surrounds
    the layers. The pass is repeated from the cache as it was before it; where a cache cannot be
    cut back, the error is raised.
    """
    inner = model.forward
    first = next(iter(getattr(model.get_decoder(), "layers", ())), None)
    prompt, context = False, 1

    def begin(*_: Any) -> None:
        executor.begin_step(prompt=prompt, context=context)

    if first is not None:
        first.register_forward_pre_hook(begin)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal prompt, context
        lengths = _lengths(kwargs.get("past_key_values"))
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows, new = (1, 1) if ids is None else ids.shape
        prompt, context = new > 1, new + max((n for n in lengths if n), default=0)
        begin()
        error = None
        try:
            output = inner(*args, **kwargs)
        except torch.OutOfMemoryError as raised:
            error = bare(raised)
        if error is not None:  # what the broken pass held is free by now
            executor.shrink(error)
            _cut_back(kwargs.get("past_key_values"), lengths, error)
            begin()
            output = inner(*args, **kwargs)
        executor.end_step(seconds.head(rows * new))
        return output

    model.forward = forward


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
