"""A model's dense weights and norms as the kernels take them, wherever they lie in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from cpu_experts.decoder.matrices import Matrix, Norm
from hybrid.anatomy.names import MLP_PROJECTIONS
from hybrid.anatomy.norms import read_norm
from hybrid.anatomy.samples import UnfitError, floats
from hybrid.packed.dense import (
    Arena,
    PackedMlp,
    QuantizedLinear,
    pack_linear,
    pack_mlp,
    replace_modules,
)


def only(module: nn.Module, allowed: str, what: str) -> None:
    """Raise UnfitError where a module has other parts than those allowed."""
    strange = [name for name, _ in module.named_children() if name not in allowed.split()]
    if strange:
        raise UnfitError(f"{what} has {', '.join(strange)}")


def norm_of(module: Any) -> Norm:
    """Return a norm as the kernels take it."""
    norm = read_norm(module)
    return Norm(
        weight=np.ascontiguousarray(norm.weight.numpy()),
        eps=norm.eps,
        bias=floats(getattr(module, "bias", None)),
        centered=norm.kind == "centred",
    )


class Packer:
    """Lays a model's dense weights out for the kernels, beside its modules or in their place.

    Parameters
    ----------
    replace
        Whether packed modules take the ordinary ones' places, whose weights are emptied.

    Attributes
    ----------
    arena
        Where what is read for every token lies.
    """

    def __init__(self, replace: bool) -> None:
        self.arena = Arena()
        self._replace = replace

    def linear(self, owner: Any, name: str) -> QuantizedLinear:
        """Return a projection's packed weights."""
        module = getattr(owner, name)
        if type(module) is nn.Linear:
            module = pack_linear(module)
            self._put(owner, name, module)
        if type(module) is not QuantizedLinear:
            raise UnfitError(f"{name} is a {type(module).__name__}")
        weights: Any = module.packed
        if not (weights.is_inference() or weights.is_shared()):  # those stay where they are
            self.arena.move(weights)
        return module

    def mlp(self, owner: Any, name: str) -> PackedMlp:
        """Return a gated MLP's packed weights."""
        module = getattr(owner, name)
        if not isinstance(module, PackedMlp):
            only(module, f"{' '.join(MLP_PROJECTIONS)} act_fn", f"{name} ({type(module).__name__})")
            packed = pack_mlp(module)
            if packed is None:
                kind = type(module).__name__
                raise UnfitError(f"{kind} has another form than gate, up and down")
            self._put(owner, name, packed)
            module = packed
        self.arena.move(module.block)
        return module

    def _put(self, owner: Any, name: str, packed: nn.Module) -> None:
        if self._replace:
            replace_modules([(owner, name, packed)])


def matrix_of(owner: Any, name: str, packer: Packer) -> Matrix:
    """Return a projection."""
    module = packer.linear(owner, name)
    return Matrix(
        weight=module.packed.numpy(),
        rows=module.rows,
        cols=module.cols,
        format=module.weight_format,
        bias=floats(module.bias),
    )
