"""A call's routing as the kernels read it: one integer table, made on the host and sent once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpu_experts.device import F32, I32

if TYPE_CHECKING:
    from torch import Tensor

#: Loads up to this many tokens a slot are for the vector kernels, which need no tiles.
VECTOR_LOAD = 4
#: Rows of a tile of the matrix kernels, by the largest load that needs no more.
TILE_ROWS = (16, 32, 64)


@dataclass(frozen=True)
class Routing:
    """(token, choice) pairs that are routed to slots, sorted by slot, then by token.

    A single token's pairs stay in the order of its choices: no slot has two of them to gather.

    Attributes
    ----------
    runs
        (slot, first pair, pairs): pairs of one slot that lie together.
    pairs, users
        N pairs, and U tokens that have one.
    tile_rows, tiles
        Most pairs that a tile holds, and how many tiles there are: none when every load is at
        most :data:`VECTOR_LOAD`.
    table
        int32, what the methods below cut apart: for every pair its user, slot, and routing
        weight (float32 bits); the pairs by user, then by choice; the users' tokens; where each
        user's pairs begin, and the end; the tiles.
    """

    runs: tuple[tuple[int, int, int], ...]
    pairs: int
    users: int
    tile_rows: int
    tiles: int
    table: I32

    @cached_property
    def largest_load(self) -> int:
        """Most tokens that one slot has."""
        return max((count for _, _, count in self.runs), default=0)

    def user_of(self, table: Tensor) -> Tensor:
        """Of every pair its user, ``[N]`` int32."""
        return table[: self.pairs]

    def slot_of(self, table: Tensor) -> Tensor:
        """Of every pair its slot, ``[N]`` int32."""
        return table[self.pairs : 2 * self.pairs]

    def weight_of(self, table: Tensor) -> Tensor:
        """Of every pair its routing weight, ``[N]`` float32."""
        import torch

        return table[2 * self.pairs : 3 * self.pairs].view(torch.float32)

    def by_user(self, table: Tensor) -> Tensor:
        """The pairs by user, then by choice, ``[N]`` int32."""
        return table[3 * self.pairs : 4 * self.pairs]

    def token_of(self, table: Tensor) -> Tensor:
        """Of every user its token, ``[U]`` int32."""
        return table[4 * self.pairs : 4 * self.pairs + self.users]

    def begin_of(self, table: Tensor) -> Tensor:
        """Where every user's pairs begin in :meth:`by_user`, and the end, ``[U + 1]`` int32."""
        at = 4 * self.pairs + self.users
        return table[at : at + self.users + 1]

    def tile_table(self, table: Tensor) -> Tensor:
        """Tiles ``[3 * tiles]`` int32: slot, first pair, pairs."""
        return table[4 * self.pairs + 2 * self.users + 1 :]


def sort_by_slot(slot_ids: I32, routing_weights: F32) -> Routing:
    """Sort a call's pairs by slot and cut large loads into tiles.

    Parameters
    ----------
    slot_ids, routing_weights
        ``[T, A]``; -1 means elsewhere.
    """
    if len(slot_ids) == 1:
        return _one_token(slot_ids[0].tolist(), routing_weights[0].view(np.int32).tolist())
    ids = slot_ids.reshape(-1)
    here = np.flatnonzero(ids >= 0)
    order = np.argsort(ids[here], kind="stable")
    slots = ids[here[order]]
    first = np.flatnonzero(np.diff(slots, prepend=-1))
    counts = np.diff(first, append=slots.size)
    tokens = here // max(1, slot_ids.shape[1])
    begins = np.diff(tokens, prepend=-1) != 0
    begin = np.flatnonzero(begins)
    by_user = np.empty_like(order)
    by_user[order] = np.arange(order.size)
    largest = int(counts.max(initial=0))
    rows = next((rows for rows in TILE_ROWS if largest <= rows), TILE_ROWS[-1])
    tiles = _tiles(slots[first], first, counts, rows) if largest > VECTOR_LOAD else _NO_TILES
    parts = (
        (np.cumsum(begins) - 1)[order],
        slots,
        routing_weights.reshape(-1)[here[order]].view(np.int32),
        by_user,
        tokens[begin],
        begin,
        [order.size],
        tiles.reshape(-1),
    )
    return Routing(
        runs=tuple(zip(slots[first].tolist(), first.tolist(), counts.tolist(), strict=True)),
        pairs=order.size,
        users=begin.size,
        tile_rows=rows,
        tiles=len(tiles),
        table=np.concatenate(parts, dtype=np.int32, casting="unsafe"),
    )


def _one_token(slots: list[int], weights: list[int]) -> Routing:
    """What one token's choices come to, without the cost of a dozen array operations."""
    here = [(slot, bits) for slot, bits in zip(slots, weights, strict=True) if slot >= 0]
    n = len(here)
    user = [0] * min(n, 1)
    numbers = [0] * n
    numbers += [slot for slot, _ in here]
    numbers += [bits for _, bits in here]
    numbers += [*range(n), *user, *user, n]
    return Routing(
        runs=tuple((slot, pair, 1) for pair, (slot, _) in enumerate(here)),
        pairs=n,
        users=len(user),
        tile_rows=TILE_ROWS[0],
        tiles=0,
        table=np.array(numbers, np.int32),
    )


Integers = NDArray[np.signedinteger]
_NO_TILES: Integers = np.empty((0, 3), np.int64)


def _tiles(slots: Integers, first: Integers, counts: Integers, rows: int) -> Integers:
    """Cut runs into tiles ``[tiles, 3]`` of at most ``rows`` pairs."""
    each = -(-counts // rows)
    at = (np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)) * rows
    size = np.minimum(rows, np.repeat(counts, each) - at)
    return np.stack([np.repeat(slots, each), np.repeat(first, each) + at, size], axis=1)
