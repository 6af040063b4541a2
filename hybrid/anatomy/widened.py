"""Modules in float32 beside a model's own: what rounding to bfloat16 is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn


def widened(module: nn.Module) -> Any:
    """Return a twin of a module that computes in float32 with the module's weights.

    Weights that are float32 or quantized are shared with the module, all others are copied.
    Nothing of the module changes, and hooks on it do not see what the twin computes.
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, Any]) -> Any:
    if id(module) in made:
        return made[id(module)]
    kind = type(module)
    twin = made[id(module)] = kind.__new__(kind)
    own = vars(twin)
    own.update(vars(module))
    own.update({name: type(value)() for name, value in own.items() if name.endswith("_hooks")})
    own["_parameters"] = _widened_tensors(module._parameters)
    own["_buffers"] = _widened_tensors(module._buffers)
    own["_modules"] = {
        name: None if child is None else _twin(child, made)
        for name, child in module._modules.items()
    }
    forward = own.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        own["forward"] = MethodType(forward.__func__, twin)
    return twin


def _widened_tensors(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: _widened_tensor(tensor) for name, tensor in tensors.items()}


def _widened_tensor(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide
