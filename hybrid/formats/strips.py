"""Strips: how a matrix is cut for the kernels, whatever its format.

A matrix ``[N, K]`` (N output rows, K inputs) is cut into strips of ``TILE`` = 16 rows. The
numbers of one strip lie together, so that a kernel streams a strip from memory while the 16
outputs stay in registers. A strip is a row of units: one input, or a group of ``GROUP`` = 32 that
shares the rows' scales, or a super-block of ``SUPER`` = 256. Rows are padded to whole strips and
inputs to whole units with zeros, which contribute nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.errors import FormatError

GROUP = 32
SUPER = 8 * GROUP
TILE = 16

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]
I64 = NDArray[np.int64]
Half = np.dtype("<f2")


def pad(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """How codes and scales lie in a unit of groups, see :mod:`hybrid.formats.groups`.

    Parameters
    ----------
    planes
        Bits of each plane, lowest first.
    groups
        G: 1, or 8 for super-blocks.
    subs
        B: bytes of sub-scales of a row and a group.
    scales
        The types of the rows' numbers.
    """

    planes: tuple[int, ...]
    groups: int = 1
    subs: int = 0
    scales: tuple[np.dtype[Any], ...] = (Half,)

    @cached_property
    def group_bytes(self) -> int:
        """Bytes of a group's codes, 16 rows."""
        return sum(self.planes) * GROUP * TILE // 8

    @cached_property
    def subs_at(self) -> int:
        """Where the sub-scales begin: of a group 16 first bytes, then 16 second ones."""
        return self.groups * self.group_bytes

    @cached_property
    def scales_at(self) -> int:
        """Where the rows' numbers begin, 16 of each kind side by side."""
        return self.subs_at + self.groups * self.subs * TILE

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self.scales_at + TILE * sum(kind.itemsize for kind in self.scales)

    @property
    def shifts(self) -> list[int]:
        """Where the planes' bits begin in a code."""
        return [sum(self.planes[:at]) for at in range(len(self.planes))]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A weight format: what a unit of a strip holds.

    Below, S are strips, U units and K = U * ``unit_inputs`` inputs.

    Parameters
    ----------
    name
        What it is called in options, indices and calibrations.
    unit_bytes, unit_inputs
        Bytes of a unit, 16 rows together, and how many inputs it holds: 1, or ``GROUP`` or
        ``SUPER`` for a quantized format, whose kernels take int8 activations.
    pack
        Turns float32 ``[S, 16, K]`` into uint8 ``[S, U, unit_bytes]``.
    weigh
        The same, given what an error of each of the K inputs counts for; None where that is all
        the same.
    unpack
        Turns uint8 ``[S, U, unit_bytes]`` into the float32 ``[S, 16, K]`` that kernels compute
        with.
    unpack_rows
        Turns the strips ``[n, U, unit_bytes]`` that n rows lie in, and their places there ``[n]``,
        into float32 ``[n, K]``.
    repack
        Turns rows as a GGUF file holds them under this name, uint8 ``[S, 16, B * block_bytes]``,
        into the uint8 ``[S, U, unit_bytes]`` of the same numbers; None where GGUF has no such type.
    hold
        Turns elements (:mod:`hybrid.formats.elements`) of whole strips ``[S * 16, K]`` into units
        of the same numbers, and whether none of their scales was rounded; None where these cannot
        be. None where no published format is like this one.
    layout
        How a unit's parts lie; None for single inputs.
    block_bytes, block_inputs
        Bytes of a block of a row in GGUF, and how many inputs it holds.
    dense
        Whether weights outside the experts can be asked for in this format.
    advised
        Whether plans propose it where weights take too much.
    tensor
        The dtype of ordinary tensors that hold the same numbers; empty where none does.
    """

    name: str
    unit_bytes: int
    unit_inputs: int
    pack: Callable[[F32], U8]
    unpack: Callable[[U8], F32]
    unpack_rows: Callable[[U8, I64], F32]
    weigh: Callable[[F32, F32], U8] | None = None
    repack: Callable[[U8], U8] | None = None
    hold: Callable[[NDArray[Any]], tuple[U8, bool] | None] | None = None
    layout: Layout | None = None
    block_bytes: int = 0
    block_inputs: int = 0
    dense: bool = False
    advised: bool = False
    tensor: str = ""

    def __post_init__(self) -> None:
        if self.unit_inputs not in (1, GROUP, SUPER) or self.unit_bytes < 1:
            raise FormatError(
                f"a unit of {self.name} holds {self.unit_inputs} inputs in {self.unit_bytes} bytes;"
                f" the kernels take units of 1, {GROUP} or {SUPER} inputs"
            )

    @property
    def quantized(self) -> bool:
        """Whether it has groups and scales (and so takes int8 activations)."""
        return self.unit_inputs > 1

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of a scale included."""
        return 8 * self.unit_bytes / (TILE * self.unit_inputs)

    def units(self, cols: int) -> int:
        """Units of a strip of ``cols`` inputs: the steps of a kernel's innermost loop."""
        return -(-cols // self.unit_inputs)

    def strip_bytes(self, cols: int) -> int:
        """Bytes of one strip of 16 rows and ``cols`` inputs."""
        return self.unit_bytes * self.units(cols)
