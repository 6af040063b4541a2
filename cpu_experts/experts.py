"""One expert as one contiguous block of bytes, and what it computes.

An expert maps a token ``x`` ``[D]`` to ``down(act(gate(x)) * up(x))`` (or ``down(act(up(x)))``
without a gate). Its block holds the up side first, then ``down``, then the biases in float32;
the 16-row strips of gate and up alternate, so that whoever computes a strip of gate has the
same rows of up at hand and can apply the activation at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpu_experts.errors import ShapeError
from cpu_experts.formats import (
    F32,
    GROUP,
    TILE,
    U8,
    check_format,
    pack,
    packed_bytes,
    pad,
    strip_bytes,
    unpack,
)

#: Activations by the number that the kernels switch on.
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Sizes, format and arithmetic shared by the experts of a layer.

    Parameters
    ----------
    hidden, intermediate
        D and F.
    format
        Weight format, see :mod:`cpu_experts.formats`.
    gated
        Whether there is a gate projection beside up.
    activation
        One of :data:`ACTIVATIONS`, applied to gate (to up when not gated).
    limit
        Clamp, before the activation: gate from above, up from both sides.
    alpha
        ``silu`` means ``g * sigmoid(alpha * g)``.
    up_offset
        Added to up after the clamp (gpt_oss multiplies by up + 1).
    bias
        Whether the projections have biases.
    """

    hidden: int
    intermediate: int
    format: str
    gated: bool = True
    activation: str = "silu"
    limit: float = math.inf
    alpha: float = 1.0
    up_offset: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.hidden < 1 or self.intermediate < 1:
            raise ShapeError(f"an expert of {self.hidden} x {self.intermediate} has no weights")
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"unknown activation {self.activation!r}",
                hint=f"choose one of: {', '.join(ACTIVATIONS)}",
            )

    @cached_property
    def padded_intermediate(self) -> int:
        """F rounded up to whole groups of 32: the columns of the buffer between the phases."""
        return pad(self.intermediate, GROUP)

    @cached_property
    def up_rows(self) -> int:
        """Rows of the packed up side, gate included."""
        return self.padded_intermediate * (2 if self.gated else 1)

    @cached_property
    def up_strip_bytes(self) -> int:
        """Bytes of one strip of the up side."""
        return strip_bytes(self.hidden, self.format)

    @cached_property
    def down_strip_bytes(self) -> int:
        """Bytes of one strip of down."""
        return strip_bytes(self.intermediate, self.format)

    @cached_property
    def down_offset(self) -> int:
        """Where down starts in the block."""
        return pad(packed_bytes(self.up_rows, self.hidden, self.format), 64)

    @cached_property
    def bias_offset(self) -> int:
        """Where the biases start: up side in packed row order, then down."""
        down = packed_bytes(self.hidden, self.intermediate, self.format)
        return pad(self.down_offset + down, 64)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the block, a multiple of 64."""
        floats = self.up_rows + pad(self.hidden, TILE) if self.bias else 0
        return pad(self.bias_offset + 4 * floats, 64)


class ExpertWeights(NamedTuple):
    """One expert in float32: gate and up ``[F, D]``, down ``[D, F]``, biases ``[F]``, ``[D]``."""

    gate: F32 | None
    up: F32
    down: F32
    gate_bias: F32 | None = None
    up_bias: F32 | None = None
    down_bias: F32 | None = None


def _check(name: str, value: F32 | None, shape: tuple[int, ...] | None) -> None:
    if value is None and shape is None:
        return
    if value is None or shape is None:
        word = "lacks" if value is None else "does not take"
        raise ShapeError(f"this expert {word} {name}")
    if value.shape != shape or value.dtype != np.float32:
        raise ShapeError(
            f"{name} is {value.dtype} {list(value.shape)}, the expert takes float32 {list(shape)}"
        )


def _interleave(shape: ExpertShape, gate: F32 | None, up: F32) -> F32:
    """Rows of gate and up, zero-padded to whole groups, alternating by strips of 16."""
    rows = shape.padded_intermediate
    sides = [side for side in (gate, up) if side is not None]
    padded = np.zeros((len(sides), rows, *up.shape[1:]), np.float32)
    for at, side in enumerate(sides):
        padded[at, : side.shape[0]] = side
    strips = padded.reshape(len(sides), rows // TILE, TILE, *up.shape[1:])
    return np.ascontiguousarray(strips.swapaxes(0, 1)).reshape(shape.up_rows, *up.shape[1:])


def separate(shape: ExpertShape, rows: F32) -> tuple[F32 | None, F32]:
    """Inverse of :func:`_interleave`."""
    sides = 2 if shape.gated else 1
    strips = rows.reshape(shape.padded_intermediate // TILE, sides, TILE, *rows.shape[1:])
    flat = strips.swapaxes(0, 1).reshape(sides, shape.padded_intermediate, *rows.shape[1:])
    parts = np.ascontiguousarray(flat[:, : shape.intermediate])
    return (parts[0] if shape.gated else None), parts[-1]


def pack_expert(
    shape: ExpertShape,
    *,
    gate: F32 | None,
    up: F32,
    down: F32,
    gate_bias: F32 | None = None,
    up_bias: F32 | None = None,
    down_bias: F32 | None = None,
    out: U8 | None = None,
) -> U8:
    """Quantize one expert into its block.

    Parameters
    ----------
    gate, up
        ``[F, D]`` float32, one output row after the other.
    down
        ``[D, F]`` float32.
    gate_bias, up_bias, down_bias
        ``[F]``, ``[F]``, ``[D]`` float32 when ``shape.bias``.
    out
        Where to write, uint8 ``[shape.block_bytes]``.

    Raises
    ------
    ShapeError
        When an array is missing, not wanted or of another shape.
    """
    d, f = shape.hidden, shape.intermediate
    _check("gate", gate, (f, d) if shape.gated else None)
    _check("up", up, (f, d))
    _check("down", down, (d, f))
    _check("gate_bias", gate_bias, (f,) if shape.bias and shape.gated else None)
    _check("up_bias", up_bias, (f,) if shape.bias else None)
    _check("down_bias", down_bias, (d,) if shape.bias else None)
    if out is None:
        out = np.empty(shape.block_bytes, np.uint8)
    elif out.dtype != np.uint8 or out.shape != (shape.block_bytes,):
        raise ShapeError(f"the block takes {shape.block_bytes} bytes, got {list(out.shape)}")
    up_bytes = packed_bytes(shape.up_rows, d, shape.format)
    down_bytes = packed_bytes(d, f, shape.format)
    pack(_interleave(shape, gate, up), shape.format, out[:up_bytes])
    out[up_bytes : shape.down_offset] = 0
    pack(down, shape.format, out[shape.down_offset : shape.down_offset + down_bytes])
    out[shape.down_offset + down_bytes :] = 0
    if up_bias is not None and down_bias is not None:
        floats = out[shape.bias_offset :].view(np.float32)
        floats[: shape.up_rows] = _interleave(shape, gate_bias, up_bias)
        floats[shape.up_rows : shape.up_rows + d] = down_bias
    return out


def unpack_expert(shape: ExpertShape, block: U8) -> ExpertWeights:
    """Return the float32 weights that the kernels compute with.

    Raises
    ------
    ShapeError
        When ``block`` is not uint8 ``[shape.block_bytes]``.
    """
    if block.dtype != np.uint8 or block.shape != (shape.block_bytes,):
        raise ShapeError(f"the block takes {shape.block_bytes} bytes, got {list(block.shape)}")
    d, f = shape.hidden, shape.intermediate
    up_bytes = packed_bytes(shape.up_rows, d, shape.format)
    down_bytes = packed_bytes(d, f, shape.format)
    gate, up = separate(shape, unpack(block[:up_bytes], shape.up_rows, d, shape.format))
    down = unpack(block[shape.down_offset : shape.down_offset + down_bytes], d, f, shape.format)
    if not shape.bias:
        return ExpertWeights(gate, up, down)
    floats = block[shape.bias_offset :].view(np.float32)
    gate_bias, up_bias = separate(shape, floats[: shape.up_rows])
    return ExpertWeights(
        gate, up, down, gate_bias, up_bias, floats[shape.up_rows : shape.up_rows + d].copy()
    )
