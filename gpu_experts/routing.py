"""A call's routing as the kernels read it: one integer table, made on the host and sent once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpu_experts.device import F32, I32

if TYPE_CHECKING:
    from torch import Tensor

#: Rows of a tile of the matrix kernels, by the largest load that needs no more.
TILE_ROWS = (16, 32, 64)


@dataclass(frozen=True)
class Routing:
    """(token, choice) pairs that are routed to slots, sorted by slot.

    Attributes
    ----------
    shape
        ``(T, A)``.
    runs
        (slot, first pair, pairs) of every distinct slot, by slot.
    table
        int32, one part after the other: the pairs' tokens ``[N]``; their routing weights
        ``[N]`` as float32 bits; for every token and choice the slot ``[T, A]``, the pair
        ``[T, A]`` (-1 where elsewhere) and the routing weight ``[T, A]`` as float32 bits; the
        tiles ``[tiles, 3]``: slot, first pair, pairs.
    tile_rows
        Most pairs that a tile holds.
    tiles
        How many there are.
    """

    shape: tuple[int, int]
    runs: tuple[tuple[int, int, int], ...]
    table: I32
    tile_rows: int
    tiles: int

    @property
    def pairs(self) -> int:
        """N, how many pairs are routed to slots."""
        return sum(count for _, _, count in self.runs)

    @property
    def largest_load(self) -> int:
        """Most tokens that one slot has."""
        return max((count for _, _, count in self.runs), default=0)

    def tokens(self, table: Tensor) -> Tensor:
        """The pairs' tokens ``[N]`` int32."""
        return table[: self.pairs]

    def weights(self, table: Tensor) -> Tensor:
        """The pairs' routing weights ``[N]`` float32."""
        return _floats(table[self.pairs : 2 * self.pairs])

    def slot_of(self, table: Tensor) -> Tensor:
        """Slots ``[T * A]`` int32, -1 where elsewhere."""
        return self._choices(table, 0)

    def pair_of(self, table: Tensor) -> Tensor:
        """Pairs ``[T * A]`` int32, -1 where elsewhere."""
        return self._choices(table, 1)

    def weight_of(self, table: Tensor) -> Tensor:
        """Routing weights ``[T * A]`` float32."""
        return _floats(self._choices(table, 2))

    def _choices(self, table: Tensor, part: int) -> Tensor:
        size = self.shape[0] * self.shape[1]
        at = 2 * self.pairs + part * size
        return table[at : at + size]

    def tile_table(self, table: Tensor) -> Tensor:
        """Tiles ``[3 * tiles]`` int32: slot, first pair, pairs."""
        return table[2 * self.pairs + 3 * self.shape[0] * self.shape[1] :]


def _floats(bits: Tensor) -> Tensor:
    import torch

    return bits.view(torch.float32)


def sort_by_slot(slot_ids: I32, routing_weights: F32) -> Routing:
    """Sort a call's pairs by slot and cut them into tiles.

    Parameters
    ----------
    slot_ids, routing_weights
        ``[T, A]``; -1 means elsewhere.
    """
    tokens, choices = slot_ids.shape
    ids = slot_ids.reshape(-1).astype(np.int32)
    order = np.argsort(ids, kind="stable")
    order = order[np.searchsorted(ids[order], 0) :]
    slots, first, counts = np.unique(ids[order], return_index=True, return_counts=True)
    runs = tuple((int(s), int(f), int(n)) for s, f, n in zip(slots, first, counts, strict=True))
    largest = int(counts.max(initial=0))
    rows = next((rows for rows in TILE_ROWS if largest <= rows), TILE_ROWS[-1])
    tiles = [
        (slot, at, min(rows, start + count - at))
        for slot, start, count in runs
        for at in range(start, start + count, rows)
    ]
    pair_of = np.full(ids.size, -1, np.int32)
    pair_of[order] = np.arange(order.size, dtype=np.int32)
    bits = np.ascontiguousarray(routing_weights, dtype=np.float32).reshape(-1).view(np.int32)
    table = np.concatenate(
        [
            (order // max(choices, 1)).astype(np.int32),
            bits[order],
            ids,
            pair_of,
            bits,
            np.array(tiles, np.int32).reshape(-1),
        ]
    )
    return Routing((tokens, choices), runs, table, rows, len(tiles))
