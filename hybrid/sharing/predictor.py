"""Predicts which experts the next layers will choose: their routers on this layer's hidden state.

A router's input is the layer's stream, normalised and scaled by a norm's weight. From one layer to
the next the stream changes little, so the routers of the next layers already say much on this one
(HybriMoE, arXiv 2504.05897; Fate, arXiv 2502.12224). With the norm's weight folded into the
router's, the stream of layer l, had by dividing the experts' input by the norm weight that made it,
meets the routers of layers l+1, l+2 and l+3 in one product.

How good that is is not believed but counted: every router's choice is compared with what was
predicted for it, and the chance that an expert is activated is the share of tokens for which the
expert at that place of the ranking was, at that distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.anatomy.routers import Ids, Selection, ranking
from hybrid.anatomy.survey import LayerView, RouterView, survey
from hybrid.errors import UsageError
from hybrid.grafts import hook_before
from hybrid.sharing.hitrates import HitRates

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

#: Layers looked ahead.
DISTANCES = 3
#: Tokens of a prompt that stand for all of it.
SAMPLE = 128


@dataclass(frozen=True, eq=False)
class _Reach:
    """What is computed at one layer: the next layers' routers on its stream.

    Parameters
    ----------
    rows
        ``[M * N, D]`` the folded routers of the next M layers, a view of all layers'.
    offset
        ``[M * N]`` what their norms and routers add.
    scale, shift
        ``[D]`` float32, the stream is ``input * scale + shift``; None where it is the input.
    ahead
        For each of the M layers its index, or None where nothing can be told.
    selections
        How many of the M layers choose alike, one after another, and how; corrections stacked.
    """

    rows: Tensor
    offset: Tensor
    scale: Tensor | None
    shift: Tensor | None
    ahead: tuple[int | None, ...]
    selections: tuple[tuple[int, Selection], ...]


class _Waiting:
    """What was foretold of a layer for a step of some tokens: rankings, ``[S, N]``, by distance."""

    def __init__(self) -> None:
        self.tokens = 0
        self.orders: dict[int, Ids] = {}

    def add(self, tokens: int, distance: int, order: Ids) -> None:
        if tokens != self.tokens:  # of another step, which did not reach the layer
            self.tokens, self.orders = tokens, {}
        self.orders[distance] = order


class Lookahead:
    """Predicts the experts of the next layers; make one with :meth:`discover`.

    For each layer in turn: :meth:`scores` on the experts' input, then :meth:`probabilities` or
    :meth:`expected_loads`, and :meth:`learn` what the layer's own router chose.

    Attributes
    ----------
    reason
        Which layers are not predicted and why, for the report; None when all are.
    nbytes
        Memory of the folded routers, on the model's device.
    """

    def __init__(self, model: Any, views: Sequence[LayerView], *, sample: int = SAMPLE) -> None:
        self._sample = sample
        self._experts = [view.spec.experts for view in views]
        self._top_k = [view.top_k for view in views]
        self.reason = _reason(views)
        choices = max((len(view.router.weight) for view in views if view.router), default=0)
        self._rates = HitRates(choices, max(self._top_k, default=0))
        self._reach, self.nbytes = _fold(views, choices, model.device, model.dtype)
        self._waiting = [_Waiting() for _ in views]
        self._tokens = [0] * len(views)
        self._inputs: dict[int, Tensor] = {}
        self._hooks = [
            hook_before(view.router.module, self._keeping(layer), "a router's input is kept")
            for layer, view in enumerate(views)
            if view.router is not None and view.router.entry is None and self._reach[layer]
        ]

    @classmethod
    def discover(
        cls,
        model: Any,
        specs: Sequence[ExpertsSpec],
        *,
        views: Sequence[LayerView] | None = None,
        sample: int = SAMPLE,
    ) -> Lookahead:
        """Find the routers of ``model`` and fold them.

        Parameters
        ----------
        model, specs
            As for :func:`hybrid.anatomy.survey.survey`.
        views
            Its result, where it is there already.
        sample
            The most tokens of a call that are looked at; a longer prompt's are taken evenly.
        """
        return cls(model, survey(model, specs) if views is None else views, sample=sample)

    def limit(self, layers: int) -> None:
        """Foretell no more than so many layers at once from now on: who needs one pays for one."""
        self._reach = [None if reach is None else _cut(reach, layers) for reach in self._reach]

    def remove(self) -> None:
        """Take the hooks off that some families need (see :attr:`RouterView.entry`)."""
        for hook in self._hooks:
            hook.undo()
        self._hooks.clear()

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return the logits of the next layers' routers on the input of this layer's experts.

        Parameters
        ----------
        layer
            Index among the layers with experts.
        hidden
            ``[..., D]``, T tokens.

        Returns
        -------
        ``[M, S, N]`` float32 on ``hidden``'s device, for the next M <= 3 layers and S <= T tokens,
        N experts; None at the last layer and where nothing can be told.
        """
        kept = self._inputs.pop(layer, None)
        reach = self._reach[layer]
        if reach is None:
            return None
        x = (hidden if kept is None else kept).detach()
        x = x.reshape(-1, x.shape[-1])
        self._tokens[layer] = x.shape[0]
        if x.shape[0] > self._sample:
            x = x[:: _every(x.shape[0], self._sample)]
        if reach.scale is not None:
            x = x * reach.scale
        if reach.shift is not None:
            x = x + reach.shift
        out = linear(x.to(reach.rows.dtype), reach.rows, reach.offset).float()
        return out.view(x.shape[0], len(reach.ahead), -1).transpose(0, 1)

    def probabilities(self, layer: int, scores: F32) -> list[tuple[int, F64]]:
        """Return for each of the next layers the chance of each expert to be activated, ``[E]``.

        Parameters
        ----------
        layer, scores
            What :meth:`scores` was given and has returned, as numpy. With several tokens, an
            expert is activated when any of all T tokens activates it.
        """
        chances = self._rates.chances(self._ranked(layer, scores))
        if self._tokens[layer] == 1:
            return self._by_layer(layer, chances[:, 0])
        share = self._tokens[layer] / chances.shape[1]
        return self._by_layer(layer, 1.0 - np.prod(1.0 - chances, axis=1) ** share)

    def expected_loads(self, layer: int, scores: F32) -> list[tuple[int, F64]]:
        """Return for each of the next layers the tokens that each expert is expected to get.

        Takes what :meth:`probabilities` takes; for prompts.
        """
        chances = self._rates.chances(self._ranked(layer, scores))
        share = self._tokens[layer] / chances.shape[1]
        return self._by_layer(layer, chances.sum(axis=1) * share)

    def ranking(self, layer: int, scores: F32) -> list[tuple[int, Ids]]:
        """Return for each of the next layers every token's experts, likeliest first, ``[S, N]``.

        Takes what :meth:`probabilities` takes.
        """
        order, reach = self._ranked(layer, scores), self._reach[layer]
        assert reach is not None
        return [(m, order[i]) for i, m in enumerate(reach.ahead) if m is not None]

    def learn(self, layer: int, ids: Ids) -> None:
        """Compare what was predicted for ``layer`` with what its router chose, ``[T, A]``."""
        waiting, self._waiting[layer] = self._waiting[layer], _Waiting()
        if waiting.orders and ids.size == waiting.tokens * self._top_k[layer]:
            chosen = ids.reshape(waiting.tokens, -1)
            every = _every(waiting.tokens, self._sample)
            self._rates.count(waiting.orders, chosen[::every] if every > 1 else chosen)

    def recall(self) -> dict[int, float]:
        """Return by distance the share of the chosen experts that were among as many predicted."""
        return self._rates.recall()

    def _ranked(self, layer: int, scores: F32) -> Ids:
        """Rank each token's experts, ``[M, S, N]``, to be compared with what the routers choose."""
        reach = self._reach[layer]
        if reach is None or len(reach.ahead) != len(scores):
            raise UsageError(
                f"layer {layer} foretells {len(reach.ahead) if reach else 0} layers, "
                f"got scores of {len(scores)}",
                hint="pass on what scores() returned for this layer",
            )
        if len(reach.selections) == 1:
            order = ranking(reach.selections[0][1].scores(scores))
        else:
            order = np.empty(scores.shape, np.int64)
            start = 0
            for count, selection in reach.selections:
                part = slice(start, start + count)
                order[part] = ranking(selection.scores(scores[part]))
                start += count
        for distance, ahead in enumerate(reach.ahead, 1):
            if ahead is not None:
                self._waiting[ahead].add(self._tokens[layer], distance, order[distance - 1])
        return order

    def _by_layer(self, layer: int, values: F64) -> list[tuple[int, F64]]:
        """Return rows of ``values``, ``[M, N]``, with their layers; experts with weights only."""
        reach = self._reach[layer]
        assert reach is not None
        return [
            (ahead, values[i, : self._experts[ahead]])
            for i, ahead in enumerate(reach.ahead)
            if ahead is not None
        ]

    def _keeping(self, layer: int) -> Callable[..., None]:
        """Make a hook that keeps the router's input, where the experts' does not tell it."""

        def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inputs.clear()
            self._inputs[layer] = args[0]

        return keep


def _every(tokens: int, sample: int) -> int:
    """Which part of the tokens makes no more than ``sample`` of them: every n-th."""
    return -(-tokens // sample)


def _reason(views: Sequence[LayerView]) -> str | None:
    whys: dict[str, list[int]] = {}
    for layer, view in enumerate(views):
        if view.router is None:
            whys.setdefault(view.why, []).append(layer)
    parts = [f"layers {', '.join(map(str, layers))}: {why}" for why, layers in whys.items()]
    return "; ".join(parts) or None


def _joined(routers: Sequence[RouterView | None], choices: int) -> Iterator[tuple[int, Selection]]:
    """Give the selections of layers in a row, those that differ in corrections alone as one."""
    found = [Selection() if router is None else router.selection for router in routers]
    for _, same in groupby(found, key=lambda selection: selection.kind):
        group = list(same)
        first = group[0]
        if first.correction is None:
            yield len(group), first
        else:
            stacked = np.zeros((len(group), 1, choices), np.float32)
            for row, selection in zip(stacked, group, strict=True):
                assert selection.correction is not None
                row[0, : len(selection.correction)] = selection.correction
            yield len(group), replace(first, correction=stacked)


def _fold(
    views: Sequence[LayerView], choices: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[_Reach | None], int]:
    """Fold every router with its norm, stack them, and cut the stack for each layer; its bytes.

    ``router(normalised * weight + bias)`` is ``(router * weight) normalised + router bias``.
    """
    routers = [view.router for view in views]
    size = next((router.weight.shape[1] for router in routers if router), 0)
    stack = torch.zeros(len(views), choices, size)
    offset = torch.full((len(views), choices), -torch.inf)
    for layer, router in enumerate(routers):
        if router is not None:
            rows = len(router.weight)
            stack[layer, :rows] = router.weight * router.scaling.weight
            offset[layer, :rows] = router.weight @ router.scaling.bias
            if router.bias is not None:
                offset[layer, :rows] += torch.from_numpy(router.bias)
    stack, offset = stack.to(device, dtype), offset.to(device, dtype)

    def reach(layer: int) -> _Reach | None:
        router, after = routers[layer], range(layer + 1, min(layer + 1 + DISTANCES, len(views)))
        ahead = tuple(m if _reachable(router, routers[m]) else None for m in after)
        if router is None or all(m is None for m in ahead):
            return None
        entry = router.entry or router.scaling
        usable = entry.weight.abs() > 1e-6 * entry.weight.abs().max()
        scale = torch.where(usable, 1.0 / entry.weight, 0.0)
        shift = -entry.bias * scale
        plain = bool((scale == 1).all())
        return _Reach(
            rows=stack[after.start : after.stop].flatten(0, 1),
            offset=offset[after.start : after.stop].flatten(),
            scale=None if plain and not shift.any() else scale.to(device),
            shift=shift.to(device) if shift.any() else None,
            ahead=ahead,
            selections=tuple(_joined(routers[after.start : after.stop], choices)),
        )

    return [reach(layer) for layer in range(len(views))], stack.nbytes + offset.nbytes


def _cut(reach: _Reach, layers: int) -> _Reach | None:
    """Keep no more than the next ``layers`` layers."""
    ahead = reach.ahead[:layers]
    if all(m is None for m in ahead):
        return None
    size = len(reach.rows) // len(reach.ahead) * len(ahead)
    selections, left = [], len(ahead)
    for count, selection in reach.selections:
        if left > 0:
            kept = None if selection.correction is None else selection.correction[:left]
            selections.append((min(count, left), replace(selection, correction=kept)))
            left -= count
    return replace(
        reach,
        rows=reach.rows[:size],
        offset=reach.offset[:size],
        ahead=ahead,
        selections=tuple(selections),
    )


def _reachable(router: RouterView | None, other: RouterView | None) -> bool:
    """Whether one layer's stream is normalised as the other's is."""
    return router is not None and other is not None and router.scaling.kind == other.scaling.kind
