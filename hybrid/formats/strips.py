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


def pad(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Format:
    """A weight format: what a unit of a strip holds.

    Below, S are strips, U units and K = U * ``unit_inputs`` inputs.

    Parameters
    ----------
    name
        What it is called in options, indices and calibrations.
    number
        What compiled kernels know it by; never that of another format.
    unit_bytes, unit_inputs
        Bytes of a unit, 16 rows together, and how many inputs it holds: 1, or ``GROUP`` or
        ``SUPER`` for a quantized format, whose kernels take int8 activations.
    pack
        Turns float32 ``[S, 16, K]`` into uint8 ``[S, U, unit_bytes]``.
    unpack
        Turns uint8 ``[S, U, unit_bytes]`` into the float32 ``[S, 16, K]`` that kernels compute
        with.
    unpack_rows
        Turns the strips ``[n, U, unit_bytes]`` that n rows lie in, and their places there ``[n]``,
        into float32 ``[n, K]``.
    repack
        Turns rows as a GGUF file holds them under this name, uint8 ``[S, 16, B * block_bytes]``,
        into the uint8 ``[S, U, unit_bytes]`` of the same numbers; None where GGUF has no such type.
    block_bytes, block_inputs
        Bytes of a block of a row in GGUF, and how many inputs it holds.
    dense
        Whether weights outside the experts can be asked for in this format.
    tensor
        The dtype of ordinary tensors that hold the same numbers; empty where none does.
    """

    name: str
    number: int
    unit_bytes: int
    unit_inputs: int
    pack: Callable[[F32], U8]
    unpack: Callable[[U8], F32]
    unpack_rows: Callable[[U8, I64], F32]
    repack: Callable[[U8], U8] | None = None
    block_bytes: int = 0
    block_inputs: int = 0
    dense: bool = False
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
