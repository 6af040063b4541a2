"""Finds the experts of a model, whatever its family calls them.

Nearly every family in transformers declares its experts through one interface and is handled
by its flags; the families that do not have an adapter here. Whatever is neither raises at load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.errors import UnsupportedModelError
from hybrid.formats.block import Block
from hybrid.grafts import (
    call_experts_function,
    experts_forward,
    experts_forward_with_identity,
    llama4_block_forward,
    replace_method,
)

_IMPLEMENTATION = "hybrid"


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The experts of one layer as the model declares them.

    Parameters
    ----------
    path, module
        Where they are in the model.
    experts
        E, the number of experts that have weights.
    hidden, intermediate, gated, bias
        As in :class:`hybrid.formats.block.Block`.
    up, down
        Names of the parameters, relative to ``module``: one fused or two (gate, up) on the up
        side. Their biases, if any, are called the same with ``_bias`` appended.
    transposed_up, transposed_down
        Whether an expert's matrix is ``[in, out]``.
    interleaved
        Whether a fused up side alternates gate and up row by row; else gate comes first.
    stacked
        Whether parameters are matrices of all experts' rows, ``[E * F, D]``.
    forward
        Replaces the family's own forward; None when transformers' interface does.
    forward_of
        Path of the module whose forward is replaced.
    """

    path: str
    module: nn.Module
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    bias: bool
    up: tuple[str, ...]
    down: str
    transposed_up: bool = False
    transposed_down: bool = False
    interleaved: bool = False
    stacked: bool = False
    forward: Callable[..., Any] | None = None
    forward_of: str = ""

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.up, self.down)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that moves into the store."""
        biases = [f"{name}_bias" for name in self.matrices] if self.bias else []
        return (*self.matrices, *biases)

    def split_up(self, parts: list[Tensor]) -> list[Tensor]:
        """Return gate (if gated) and up, ``[F, ...]`` each, from one expert's up-side tensors.

        ``parts`` are in the order of :attr:`up`, without an expert dimension, matrices laid
        out as the family stores them.
        """
        parts = [part.T if self.transposed_up and part.ndim == 2 else part for part in parts]
        if not self.gated or len(parts) == 2:
            return parts
        (fused,) = parts
        return [fused[0::2], fused[1::2]] if self.interleaved else list(fused.chunk(2))

    def join_up(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return ``[S, 2F]`` as the family's own gating takes it (``[S, F]`` without a gate)."""
        if gate is None:
            return up
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)

    def apply_gate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Apply the family's own gating code to raw gate and up, ``[S, F]`` each."""
        module: Any = self.module
        if gate is not None and hasattr(module, "_apply_gate"):
            gated: Tensor = module._apply_gate(self.join_up(gate, up))
            return gated
        act: Callable[[Tensor], Tensor]
        act = module.act_fn if hasattr(module, "act_fn") else module.mlp.activation_fn
        return act(up) if gate is None else act(gate) * up

    def install(self, model: nn.Module) -> None:
        """Make the family call the store's experts."""
        if self.forward is None:
            call_experts_function(self.module, _IMPLEMENTATION)
        else:
            replace_method(model.get_submodule(self.forward_of), self.forward)


def offer_experts_function() -> None:
    """Let transformers' experts interface know our function by its name, in this process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, experts_forward)


def _on_interface(path: str, module: Any) -> ExpertsSpec:
    """transformers' interface: flags say how the parameters are laid out."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name, None), getattr(module, "down_proj", None)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        raise _unsupported(path, module, f"no {up_name} and down_proj of three dimensions")
    hidden, intermediate = down.shape[1:][:: -1 if module.is_transposed else 1]
    return ExpertsSpec(
        path=path,
        module=module,
        experts=down.shape[0],
        hidden=hidden,
        intermediate=intermediate,
        gated=module.has_gate,
        bias=module.has_bias,
        up=(up_name,),
        down="down_proj",
        transposed_up=module.is_transposed,
        transposed_down=module.is_transposed,
        interleaved=not module.is_concatenated,
    )


def _fused(path: str, module: Any, **more: Any) -> ExpertsSpec:
    """gate_up_proj and down_proj like the interface's default, but with a forward of its own."""
    experts, hidden, intermediate = module.down_proj.shape
    spec = ExpertsSpec(
        path=path,
        module=module,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        gated=True,
        bias=False,
        up=("gate_up_proj",),
        down="down_proj",
        forward=experts_forward,
        forward_of=path,
    )
    return replace(spec, **more)


def _dbrx(path: str, module: Any) -> ExpertsSpec:
    """Three parameters that stack all experts' rows; w2 is stored transposed."""
    return ExpertsSpec(
        path=path,
        module=module,
        experts=module.num_experts,
        hidden=module.hidden_size,
        intermediate=module.ffn_hidden_size,
        gated=True,
        bias=False,
        up=("mlp.w1", "mlp.v1"),
        down="mlp.w2",
        transposed_down=True,
        stacked=True,
        forward=experts_forward,
        forward_of=path,
    )


def _llama4(path: str, module: Any) -> ExpertsSpec:
    """The routing weights scale the experts' input, in the block around the experts."""
    _, intermediate, hidden = module.down_proj.shape
    return _fused(
        path,
        module,
        hidden=hidden,
        intermediate=intermediate,
        transposed_up=True,
        transposed_down=True,
        forward=llama4_block_forward,
        forward_of=path.rpartition(".")[0],
    )


_ADAPTERS: dict[str, Callable[[str, Any], ExpertsSpec]] = {
    "DbrxExperts": _dbrx,
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": lambda path, module: _fused(
        path, module, forward=experts_forward_with_identity
    ),
    "Step3p7Experts": _fused,
}


def _unsupported(path: str, module: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} at {path} cannot run from an expert store: {why}",
        hint="run this model with transformers alone",
    )


def find_experts(model: nn.Module) -> list[ExpertsSpec]:
    """List the layers of ``model`` that have experts, in order; there may be none.

    Raises
    ------
    UnsupportedModelError
        When some experts are of a kind that cannot run from a store.
    """
    return list(_describe_all(model))


def _describe_all(model: nn.Module) -> Iterator[ExpertsSpec]:
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in _ADAPTERS:
            yield _ADAPTERS[kind](path, module)
        elif hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):
            yield _on_interface(path, module)
        elif re.search(r"(?<!Shared)Experts$", kind) or path.rpartition(".")[2] == "experts":
            raise _unsupported(path, module, "it declares its experts in a way of its own")


def recognise_gating(spec: ExpertsSpec, shape: Block) -> Block | None:
    """Find the kernels' parameters for the gating code of a family.

    The family's own code runs on samples that reach far into every clamp and tail, and the
    parameters that reproduce it are returned as a ``shape``; None means that no parameters do
    and the family's own code has to run between the two projections.
    """
    seeded = torch.Generator().manual_seed(0)
    # In float64, lest a tail's cancellation noise is taken for a difference.
    scale = torch.tensor([0.1, 1.0, 4.0, 16.0, 200.0]).double().repeat_interleave(64)
    up = torch.randn(len(scale), generator=seeded) * scale
    gate = torch.randn(len(scale), generator=seeded) * scale.flip(0).roll(64)
    rows = [side[:, None].expand(-1, shape.intermediate) for side in (gate, up)]
    expected = spec.apply_gate(rows[0] if spec.gated else None, rows[1]).double()
    numbers = [
        float(value)
        for value in vars(spec.module).values()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    ]
    for limit in (math.inf, *numbers):
        for name, alpha in [*((name, 1.0) for name in _ACTIVATIONS), *_silus(numbers)]:
            for up_offset in (0.0, 1.0) if spec.gated else (0.0,):
                found = _gating(gate if spec.gated else None, up, name, limit, alpha, up_offset)
                if torch.allclose(found[:, None], expected, rtol=1e-5, atol=1e-6):
                    return replace(
                        shape, activation=name, limit=limit, alpha=alpha, up_offset=up_offset
                    )
    return None


def _silus(numbers: list[float]) -> list[tuple[str, float]]:
    """silu with the family's own slopes, and with the slope of quick_gelu."""
    return [("silu", alpha) for alpha in (1.702, *numbers)]


#: The activations by the kernels' names.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}


def _gating(
    gate: Tensor | None, up: Tensor, name: str, limit: float, alpha: float, up_offset: float
) -> Tensor:
    """The arithmetic that :class:`Block` parametrises, in torch."""
    up = up.clamp(-limit, limit)
    x = up if gate is None else gate.clamp(max=limit)
    activated = x * torch.sigmoid(alpha * x) if alpha != 1.0 else _ACTIVATIONS[name](x)
    return activated if gate is None else activated * (up + up_offset)
