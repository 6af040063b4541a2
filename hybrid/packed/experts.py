"""The experts of a loaded model: a view of the store and the arithmetic around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cpu_experts.ffn import project_down, project_up, run_experts
from cpu_experts.workspace import Ids
from gpu_experts.reference import sides_of
from hybrid.anatomy.experts import ExpertsSpec, offer_experts_function, recognise_gating
from hybrid.formats.block import Block
from hybrid.formats.strips import F32
from hybrid.grafts import expert_modules, runner_of
from hybrid.packed import gradients
from hybrid.packed.bf16_products import run_panels
from hybrid.packed.gradients import in_torch
from hybrid.stopwatch import Stopwatch
from hybrid.weights.store import U8, ExpertStore, LayerRecord


class PackedLayer(Protocol):
    """One layer's experts: their packed blocks, what they compute, and how the CPU does."""

    @property
    def blocks(self) -> U8:
        """``[E, stride]`` uint8."""

    @property
    def shape(self) -> Block:
        """Layout and arithmetic."""

    @property
    def panels_from(self) -> int | None:
        """The load from which torch multiplies (``bf16_products.py``); None is never."""


@dataclass(frozen=True)
class BareLayer:
    """A :class:`PackedLayer` without a model around it."""

    blocks: U8
    shape: Block
    panels_from: int | None = None


class LayerExperts:
    """One layer's experts, ready to run.

    Not an ``nn.Module`` and without parameters, so that moving or casting the model leaves
    the experts where they are.

    Parameters
    ----------
    spec
        What the model says about them.
    store, record
        Where they are kept.
    panels_from
        As of :class:`PackedLayer`; who places the model on a device settles it anew.

    Attributes
    ----------
    blocks
        ``[E, stride]`` uint8, a view of the mapped store.
    shape
        Their layout and arithmetic.
    own_gating
        Whether the family's own gating code runs between the projections because the kernels
        have no parameters for it.
    watch
        What calls took since the run began.
    loads
        Tokens that each expert got of the run's prompt: a row for every piece of it.
    observe
        Told, before a call computes them, every chosen expert and what its matrices multiply:
        ``[n, D]`` and ``[n, F]`` float32. None is nobody, which is as it is but for those who
        collect an importance matrix.
    """

    loads: tuple[list[int], ...] = ()
    observe: Callable[[int, Tensor, Tensor], None] | None = None
    _uncounted = 0

    def __init__(
        self,
        spec: ExpertsSpec,
        store: ExpertStore,
        record: LayerRecord,
        panels_from: int | None = None,
    ) -> None:
        self.spec = spec
        self.watch = Stopwatch()
        self.panels_from = panels_from
        self._place = store, record
        self.blocks = store.blocks(record)
        shape = record.shape(store.index.format)
        self.norm = getattr(spec.module, "post_expert_norm", None)
        known = None if self.norm is not None else recognise_gating(spec, shape)
        self.own_gating = known is None
        self.shape = shape if known is None else known

    def __getstate__(self) -> dict[str, Any]:
        """Copies share the store's bytes."""
        return {name: value for name, value in vars(self).items() if name != "blocks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        offer_experts_function()  # nobody may have loaded a model in this process
        store, record = self._place
        self.blocks = store.blocks(record)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # kernels are not torch's
    def __call__(self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Parameters
        ----------
        hidden
            ``[..., D]`` in the model's dtype.
        expert_ids, routing_weights
            ``[T, A]``, used as they are; ids of E and above contribute nothing.
        """
        with self.watch:
            if self._uncounted > 0:
                self._count(expert_ids)
            if self.observe is not None:
                self._show(self.observe, hidden, expert_ids)
            return self._compute(hidden, expert_ids, routing_weights)

    def begin_run(self, prompt_tokens: int) -> None:
        """Forget the last run; the next ``prompt_tokens`` are a prompt, whose loads are counted."""
        self.watch.reset()
        self.loads, self._uncounted = (), prompt_tokens

    def _count(self, expert_ids: Tensor) -> None:
        count = len(self.blocks)
        chosen = expert_ids.detach().reshape(-1)
        loads = chosen[chosen < count].bincount(minlength=count)
        self.loads = (*self.loads, loads.tolist())
        self._uncounted -= len(expert_ids)

    def _show(
        self, observe: Callable[[int, Tensor, Tensor], None], hidden: Tensor, expert_ids: Tensor
    ) -> None:
        """Tell what the chosen experts' matrices multiply, computed in torch."""
        gate = self._gate()
        for expert, x in gradients.tokens_of(hidden, expert_ids, self.shape, len(self.blocks)):
            observe(expert, x, gate(gradients.up_side(self.blocks[expert], x, self.shape)))

    def _compute(self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        own = () if self.norm is None else self.norm.parameters()
        if in_torch(self.spec.module.training, hidden, routing_weights, *own):
            blocks, shape = self.blocks, self.shape
            return gradients.run_experts(
                hidden, expert_ids, routing_weights, blocks, shape, self._expert(hidden.dtype)
            )
        if not self.own_gating:
            return compute_on_cpu(hidden, expert_ids, routing_weights, self)
        x, ids, weights = _on_host(hidden, expert_ids, routing_weights, self.shape.hidden)
        out = self._run_apart(x.numpy(), ids.numpy(), weights, hidden.dtype)
        return out.view(hidden.shape).to(hidden.device, hidden.dtype)

    def _gate(self) -> gradients.Gate:
        """Return the family's own gating, between an expert's projections."""

        def gate(up_side: Tensor) -> Tensor:
            gate, up = sides_of(self.shape, up_side)
            return self.spec.apply_gate(gate if self.shape.gated else None, up)

        return gate

    def _expert(self, dtype: torch.dtype) -> Callable[[U8, Tensor], Tensor]:
        """Return what computes one expert in torch, with the family's own gating."""
        gate = self._gate()

        def expert(block: U8, x: Tensor) -> Tensor:
            down = gradients.run_expert(block, x, self.shape, gate)
            return down if self.norm is None else self.norm(down.to(dtype)).float()

        return expert

    def _run_apart(
        self, x: np.ndarray, ids: np.ndarray, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Project up, let the family's own code gate, project down, let it normalise."""
        gate, up = project_up(x, ids, self.blocks, self.shape)
        gated = self.spec.apply_gate(
            None if gate is None else torch.from_numpy(gate), torch.from_numpy(up)
        )
        h = gated.detach().float().contiguous().numpy()
        down = torch.from_numpy(project_down(h, ids, self.blocks, self.shape))
        if self.norm is not None:
            down = self.norm(down.to(dtype)).float()
        outside = torch.from_numpy((ids < 0) | (ids >= len(self.blocks)))
        kept = weights.masked_fill(outside, 0.0)
        return (down.view(*ids.shape, -1) * kept[..., None]).sum(dim=1)


def experts_of(network: torch.nn.Module) -> list[Any]:
    """Return what runs the experts of each MoE layer of a loaded model, in the layers' order."""
    return [runner_of(module) for module in expert_modules(network)]


def compute_on_cpu(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, layer: PackedLayer
) -> Tensor:
    """Return what :class:`LayerExperts` does, for experts whose gating the kernels know."""
    x, ids, weights = _on_host(hidden, expert_ids, routing_weights, layer.shape.hidden)
    out = torch.zeros(x.shape)
    add_on_cpu(x.numpy(), ids.numpy(), weights.numpy(), layer, out.numpy())
    return out.view(hidden.shape).to(hidden.device, hidden.dtype)


def add_on_cpu(x: F32, expert_ids: Ids, routing_weights: F32, layer: PackedLayer, out: F32) -> None:
    """Do what :func:`~cpu_experts.ffn.run_experts` does, each expert by the faster products.

    So the CPU computes its experts, whether it has all of them or shares them with a device.
    """
    blocks, shape, least_load = layer.blocks, layer.shape, layer.panels_from
    if least_load is not None:
        expert_ids = run_panels(x, expert_ids, routing_weights, blocks, shape, least_load, out)
    run_experts(x, expert_ids, routing_weights, blocks, shape, out)


def _on_host(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, ids and weights as the kernels take them."""
    return (
        hidden.detach().reshape(-1, width).float().cpu().contiguous(),
        expert_ids.detach().cpu(),
        routing_weights.detach().float().cpu().contiguous(),
    )
