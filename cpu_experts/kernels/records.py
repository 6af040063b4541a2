"""Records that describe weights to the kernels: numbers and addresses.

Arrays are given by their addresses (0: there is none); who fills a record in keeps them alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_experts.kernels.dots import dot_table
from hybrid.formats.activations import activation_bytes
from hybrid.formats.block import ACTIVATIONS, Block
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import TILE, U8, pad


def address(array: Any) -> int:
    """Where an array lies; 0 for None."""
    return 0 if array is None else int(array.ctypes.data)


def fill_record(record: Any, values: dict[str, Any]) -> None:
    """Write values into a record, nested ones included."""
    for name, value in values.items():
        if isinstance(value, dict):
            fill_record(record[name], value)
        else:
            record[name] = value


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts as blocks ``[E, stride]`` uint8 of one shape; a dense MLP is a single one."""

    blocks: U8
    shape: Block

    def __post_init__(self) -> None:
        blocks, size = self.blocks, self.shape.block_bytes
        good = blocks.ndim == 2 and blocks.dtype == np.uint8 and blocks.flags.c_contiguous
        if not good or blocks.shape[1] < size or blocks.shape[1] % 4:
            raise ShapeError(
                f"blocks are {blocks.dtype} {list(blocks.shape)}; they must be C-contiguous uint8"
                f" [experts, at least {size}], rows of a multiple of 4"
            )

    @property
    def h_stride(self) -> int:
        """Bytes of the intermediate activations of one expert."""
        if self.shape.down_packing.quantized:
            return activation_bytes(self.shape.intermediate)
        return 4 * self.shape.intermediate

    def record(self, threads: int) -> dict[str, Any]:
        """Values of :data:`EXPERTS`."""
        return {name: value(self, threads) for name, (_, value) in _EXPERTS.items()}


def _strips(experts: Experts, threads: int) -> int:
    """Strips of down that a share has at least."""
    strips = pad(experts.shape.hidden, TILE) // TILE
    return max(1, min(8, strips // (8 * threads)))


#: The fields of a layer's experts: type, and value for a number of threads.
_EXPERTS: dict[str, tuple[str, Callable[[Experts, int], Any]]] = {
    "at": ("i8", lambda e, _: address(e.blocks)),
    "count": ("i8", lambda e, _: e.blocks.shape[0]),
    "stride": ("i8", lambda e, _: e.blocks.shape[1]),
    "format": ("i8", lambda e, _: dot_table(e.shape.format)),
    "down_format": ("i8", lambda e, _: dot_table(e.shape.formats[1])),
    "up_strip": ("i8", lambda e, _: e.shape.up_strip_bytes),
    "up_inner": ("i8", lambda e, _: e.shape.packing.units(e.shape.hidden)),
    "section": ("i8", lambda e, _: e.shape.down_offset),
    "down_strip": ("i8", lambda e, _: e.shape.down_strip_bytes),
    "down_inner": ("i8", lambda e, _: e.shape.down_packing.units(e.shape.intermediate)),
    "kind": ("i8", lambda e, _: ACTIVATIONS.index(e.shape.activation)),
    "gated": ("i8", lambda e, _: e.shape.gated),
    "up_bias": ("i8", lambda e, _: e.shape.bias_offset if e.shape.bias else -1),
    "down_bias": (
        "i8",
        lambda e, _: e.shape.down_bias_offset if e.shape.bias else -1,
    ),
    "intermediate": ("i8", lambda e, _: e.shape.intermediate),
    "h_stride": ("i8", lambda e, _: e.h_stride),
    "strips": ("i8", _strips),
    "threads": ("i8", lambda _, threads: threads),
    "alpha": ("f4", lambda e, _: e.shape.alpha),
    "limit": ("f4", lambda e, _: e.shape.limit),
    "up_offset": ("f4", lambda e, _: e.shape.up_offset),
}

#: Experts in blocks; ``count`` 0: there are none.
EXPERTS = np.dtype([(name, kind) for name, (kind, _) in _EXPERTS.items()], align=True)
