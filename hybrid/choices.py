"""The router's choice, as the planner counts it and as the kernels take it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
F32 = NDArray[np.float32]


def loads_of(
    ids: Ids, factors: F32, experts: int
) -> tuple[tuple[tuple[int, int], ...], Sequence[float]]:
    """Return the activated experts' loads, ids ascending, and their mean routing weights."""
    if len(ids) == 1 and len(set(ids[0].tolist())) == ids.shape[1]:
        chosen = [
            pair
            for pair in zip(ids[0].tolist(), factors[0].tolist(), strict=True)
            if 0 <= pair[0] < experts
        ]
        chosen.sort()
        return tuple([(expert, 1) for expert, _ in chosen]), [weight for _, weight in chosen]
    valid = (ids >= 0) & (ids < experts)
    flat = ids[valid]
    counts = np.bincount(flat, minlength=experts)
    used = np.flatnonzero(counts)
    weights = np.bincount(flat, weights=factors[valid], minlength=experts)[used] / len(ids)
    return tuple(zip(used.tolist(), counts[used].tolist(), strict=True)), weights.tolist()


def replaced(ids: Ids, by: dict[int, int]) -> Ids:
    """Return ``ids`` with each key of ``by`` replaced and -1 in place of all others."""
    if len(ids) == 1:
        return np.array([[by.get(expert, -1) for expert in ids[0].tolist()]], np.int32)
    table = np.full(max(by) + 2, -1, np.int32)
    table[list(by)] = list(by.values())
    out_of_table = (ids < 0) | (ids > max(by))
    found: Ids = table[np.where(out_of_table, len(table) - 1, ids)]
    return found
