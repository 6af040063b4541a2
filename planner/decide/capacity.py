"""How many slots each layer gets out of one budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.decide.policy import Policy
from planner.errors import CapacityError


def equal_capacities(total: int, layers: int, experts: int) -> tuple[int, ...]:
    """Give every layer the same number of slots, the first layers one more when there are some.

    Raises
    ------
    CapacityError
        When ``total`` is negative or more than there are experts.
    """
    _check(total, layers, experts)
    each, more = divmod(total, layers)
    return tuple(each + (layer < more) for layer in range(layers))


def marginal_capacities(worth: ArrayLike, total: int) -> tuple[int, ...]:
    """Split the budget so that the worth of all layers together is greatest.

    Parameters
    ----------
    worth
        What each layer saves with c slots, ``[L, E + 1]`` for c = 0..E: hits, or hits times the
        seconds a hit saves there. Need not be concave.
    total
        Slots to give away.

    Returns
    -------
    tuple of int
        One capacity per layer; among equals, the last layers get the fewest slots.

    Raises
    ------
    CapacityError
        When ``total`` is negative or more than there are experts.

    Notes
    -----
    A knapsack with one choice per layer, solved exactly: ``best[s]`` is the greatest worth of the
    layers so far with s slots.
    """
    values = np.asarray(worth, dtype=np.float64)
    layers, sizes = values.shape
    _check(total, layers, sizes - 1)
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((layers, total + 1), dtype=np.int64)
    for layer in range(layers):
        found = np.full(total + 1, -np.inf)
        for slots in range(min(sizes - 1, total) + 1):
            gained = best[: total + 1 - slots] + values[layer, slots]
            better = gained > found[slots:]
            found[slots:][better] = gained[better]
            choice[layer, slots:][better] = slots
        best = found
    left = total
    capacities = []
    for layer in range(layers - 1, -1, -1):
        capacities.append(int(choice[layer, left]))
        left -= capacities[-1]
    return tuple(reversed(capacities))


def hits_by_capacity(
    policy: Policy, ids: NDArray[np.integer], weights: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Count what each layer would hit with every possible number of slots, ``[L, E + 1]``.

    One pass for all capacities: with c slots, the c experts that the policy values most before a
    step are taken to be resident. That is exact for LRU and close for policies of one score.

    Parameters
    ----------
    policy
        A fresh policy for L layers.
    ids, weights
        A recorded trace, ``[T, L, A]``.
    """
    layers = np.arange(policy.layers)
    rank = np.empty((policy.layers, policy.experts), dtype=np.int64)
    by_rank = np.broadcast_to(np.arange(policy.experts), rank.shape)
    needed = np.zeros((policy.layers, policy.experts + 1), dtype=np.int64)
    seen = np.zeros((policy.layers, policy.experts), dtype=bool)
    for chosen, weight in zip(ids.astype(np.int64), weights.astype(np.float64), strict=True):
        np.put_along_axis(rank, np.argsort(-policy.value(layers), kind="stable"), by_rank, 1)
        found = np.take_along_axis(seen, chosen, 1)
        slots = np.take_along_axis(rank, chosen, 1) + 1
        np.add.at(needed, (np.nonzero(found)[0], slots[found]), 1)
        np.put_along_axis(seen, chosen, True, 1)
        policy.observe(layers, chosen, weight)
    return np.cumsum(needed, axis=1)


def _check(total: int, layers: int, experts: int) -> None:
    if not 0 <= total <= layers * experts:
        raise CapacityError(
            f"{total} slots for {layers} layers of {experts} experts",
            hint="a cache holds from none to all of the model's routed experts",
        )
