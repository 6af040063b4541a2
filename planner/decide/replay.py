"""How a cache policy fares on a recorded trace, token by token as in decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.decide.cache import ExpertCache
from planner.decide.policy import Policy
from planner.errors import TraceError

Admission = Literal["always", "worth"]


@dataclass(frozen=True)
class Replay:
    """Hits of one replay.

    Parameters
    ----------
    hits, activated
        Experts found resident, and experts used, in each layer, ``[L]``.
    """

    hits: NDArray[np.int64]
    activated: NDArray[np.int64]

    @property
    def hit_rate(self) -> float:
        """Hits over activated experts, all layers together."""
        return float(self.hits.sum() / self.activated.sum())


def replay(
    policy: Policy,
    ids: NDArray[np.integer],
    weights: NDArray[np.floating],
    capacities: Sequence[int],
    admission: Admission = "always",
) -> Replay:
    """Run a trace through a cache that starts empty.

    Parameters
    ----------
    policy
        A fresh policy for L layers.
    ids, weights
        Activated experts and routing weights of each token, ``[T, L, A]``.
    capacities
        Slots of each layer, ``[L]``.
    admission
        ``always`` gives every miss a slot and keeps all of the step's experts until its end, as
        a system must that computes on the GPU only. ``worth`` gives the slots, after each step, to
        the most valued of those that were resident or used, as a system may that computes misses
        on the CPU. Under either, no policy has more hits than Belady with no fewer slots than A.

    Raises
    ------
    TraceError
        When the trace's layers are not the policy's, or weights and ids differ in shape.
    """
    if ids.ndim != 3 or ids.shape[1] != policy.layers or weights.shape != ids.shape:
        raise TraceError(
            f"a trace of ids {list(ids.shape)} and weights {list(weights.shape)} for a policy of "
            f"{policy.layers} layers",
            hint="both are [tokens, layers, top_k]",
        )
    cache = ExpertCache(policy, capacities)  # checks the capacities
    hits = (
        _batched(policy, ids.astype(np.int64), weights.astype(np.float64), capacities, admission)
        if type(policy).victim is Policy.victim
        else _one_by_one(cache, ids, weights, admission)
    )
    return Replay(hits, np.full(policy.layers, ids.shape[0] * ids.shape[2]))


def _one_by_one(
    cache: ExpertCache,
    ids: NDArray[np.integer],
    weights: NDArray[np.floating],
    admission: Admission,
) -> NDArray[np.int64]:
    """Replay through the cache that the runtime uses."""
    hits = np.zeros(ids.shape[1], dtype=np.int64)
    for step_ids, step_weights in zip(ids, weights, strict=True):
        for layer, (chosen, weight) in enumerate(zip(step_ids, step_weights, strict=True)):
            found = cache.step(layer, chosen, weight)
            hits[layer] += len(found.hits)
            misses = found.misses
            if admission == "worth":
                cache.release()
                value = cache.value(layer)
                misses = tuple(sorted(misses, key=lambda expert: (-value[expert], -expert)))
            for expert in misses:
                if cache.has_room(layer) and (
                    admission == "always" or cache.worth_admitting(layer, expert)
                ):
                    cache.admit(layer, expert)
    return hits


def _batched(
    policy: Policy,
    ids: NDArray[np.int64],
    weights: NDArray[np.float64],
    capacities: Sequence[int],
    admission: Admission,
) -> NDArray[np.int64]:
    """Replay all layers at once: the same decisions, a hundred times as fast.

    Evicting the least of the others for every miss leaves the best ones; who they are follows
    from one sort by (claim on a slot, value, id).
    """
    _, layers, _ = ids.shape
    every = np.arange(layers)
    rows = every[:, None]
    slots = np.asarray(capacities)[:, None]
    resident = np.zeros((layers, policy.experts), dtype=bool)
    rank = np.empty((layers, policy.experts), dtype=np.int64)
    by_id = np.arange(policy.experts)
    ids_up = np.broadcast_to(by_id, resident.shape)
    hits = np.zeros(layers, dtype=np.int64)
    for chosen, weight in zip(ids, weights, strict=True):
        policy.observe(every, chosen, weight)
        value = policy.value(every)
        used = np.zeros_like(resident)
        used[rows, chosen] = True
        hit = used & resident
        hits += hit.sum(axis=1)
        candidate = used | resident
        if admission == "always":
            # Hits stay, then misses take slots in the order of their ids while there are any.
            claim = np.where(hit, 3, np.where(used, 2, np.where(resident, 1, 0)))
            order = np.lexsort((ids_up, np.where(used, -by_id, value), claim), axis=1)
        else:
            # Of equals a resident stays: nothing is copied for no gain.
            order = np.lexsort((ids_up, resident, value, candidate), axis=1)
        np.put_along_axis(rank, order, np.broadcast_to(by_id[::-1], rank.shape), axis=1)
        resident = (rank < slots) & candidate
    return hits
