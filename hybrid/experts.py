"""The experts of a loaded model: a view of the store and the arithmetic around it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpu_experts.experts import ExpertShape
from cpu_experts.ffn import project_down, project_up, run_experts
from hybrid.families import ExpertsSpec, recognise_gating
from hybrid.panels import run_panels
from hybrid.store import U8, ExpertStore, LayerRecord


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
        The load from which torch multiplies, see :mod:`hybrid.panels`; None is never.

    Attributes
    ----------
    blocks
        ``[E, stride]`` uint8, a view of the mapped store.
    shape
        Their layout and arithmetic.
    own_gating
        Whether the family's own gating code runs between the projections because the kernels
        have no parameters for it.
    spent_s
        Seconds spent here since the run began.
    loads
        Tokens that each expert got of the run's prompt: a row for every piece of it.
    """

    spent_s = 0.0
    loads: tuple[list[int], ...] = ()
    _uncounted = 0

    def __init__(
        self,
        spec: ExpertsSpec,
        store: ExpertStore,
        record: LayerRecord,
        panels_from: int | None = None,
    ) -> None:
        self.spec = spec
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
        start_s = time.perf_counter()
        if self._uncounted > 0:
            self._count(expert_ids)
        out = self._compute(hidden, expert_ids, routing_weights)
        self.spent_s += time.perf_counter() - start_s
        return out

    def begin_run(self, prompt_tokens: int) -> None:
        """Forget the last run; the next ``prompt_tokens`` are a prompt, whose loads are counted."""
        self.spent_s, self.loads, self._uncounted = 0.0, (), prompt_tokens

    def _count(self, expert_ids: Tensor) -> None:
        count = len(self.blocks)
        chosen = expert_ids.detach().reshape(-1)
        loads = chosen[chosen < count].bincount(minlength=count)
        self.loads = (*self.loads, loads.tolist())
        self._uncounted -= len(expert_ids)

    def _compute(self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        if not self.own_gating:
            return compute_on_cpu(
                hidden, expert_ids, routing_weights, self.blocks, self.shape, self.panels_from
            )
        x, ids, weights = _on_host(hidden, expert_ids, routing_weights, self.shape.hidden)
        out = self._run_apart(x.numpy(), ids.numpy(), weights, hidden.dtype)
        return out.view(hidden.shape).to(hidden.device, hidden.dtype)

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
    return [m.hybrid_experts for m in network.modules() if hasattr(m, "hybrid_experts")]


def compute_on_cpu(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    blocks: U8,
    shape: ExpertShape,
    panels_from: int | None = None,
) -> Tensor:
    """Return what :class:`LayerExperts` does, for experts whose gating the kernels know."""
    x, ids, weights = _on_host(hidden, expert_ids, routing_weights, shape.hidden)
    out = torch.zeros(x.shape)
    if panels_from is not None:
        ids = run_panels(x, ids, weights, blocks, shape, panels_from, out)
    run_experts(x.numpy(), ids.numpy(), weights.numpy(), blocks, shape, out.numpy())
    return out.view(hidden.shape).to(hidden.device, hidden.dtype)


def _on_host(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, ids and weights as the kernels take them."""
    return (
        hidden.detach().reshape(-1, width).float().cpu().contiguous(),
        expert_ids.detach().cpu(),
        routing_weights.detach().float().cpu().contiguous(),
    )


def experts_forward(
    self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function that transformers' experts interface calls under the name ``hybrid``."""
    return self.hybrid_experts(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return, operator]
