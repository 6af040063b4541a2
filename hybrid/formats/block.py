"""Blocks: one expert as contiguous bytes, and what it computes.

An expert maps a token ``x`` ``[D]`` to ``down(act(gate(x)) * (up(x) + up_offset))``, or to
``down(act(up(x)))`` without a gate. Its block holds the up side first, then ``down``, then the
biases in float32; the 16-row strips of gate and up alternate (gate first), so that whoever
computes a strip of gate has the same rows of up at hand and can apply the activation at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import pack, packed_bytes, unpack
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, GROUP, TILE, U8, Format, pad

#: Activations; kernels know them by their places here.
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")

#: Every part of a block starts at a multiple of this.
_LINE = 64
#: A stride is a multiple of this.
_STEP = 16


@dataclass(frozen=True, kw_only=True)
class Block:
    """Sizes, format and arithmetic shared by the experts of a layer, and where their parts lie.

    Parameters
    ----------
    hidden, intermediate
        D and F.
    format
        Name of the weight format (:mod:`hybrid.formats.registry`) of gate and up.
    down_format
        That of down; empty where it is the same.
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
    stride
        Bytes from one expert to the next in a store, and from one slot to the next; 0 for an
        expert by itself.

    Raises
    ------
    FormatError
        On an unknown format.
    ShapeError
        On sizes, an activation or a stride that no expert has.
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
    stride: int = 0
    down_format: str = ""

    def __post_init__(self) -> None:
        for name in self.formats:
            format_of(name)
        if self.down_format == self.format:
            object.__setattr__(self, "down_format", "")
        if self.hidden < 1 or self.intermediate < 1:
            raise ShapeError(f"an expert of {self.hidden} x {self.intermediate} has no weights")
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"unknown activation {self.activation!r}",
                hint=f"choose one of: {', '.join(ACTIVATIONS)}",
            )
        if self.stride % _STEP:
            raise ShapeError(f"stride is {self.stride}, not a multiple of {_STEP}")
        if self.stride and self.stride < self.block_bytes:
            raise ShapeError(f"a block takes {self.block_bytes} bytes, the stride is {self.stride}")

    def __getstate__(self) -> dict[str, Any]:
        """Return what it was made of; the format's code, which follows from it, is not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_stride(self, stride: int) -> Block:
        """Return the same expert where a store or slots have it ``stride`` bytes apart."""
        return replace(self, stride=stride)

    @property
    def formats(self) -> tuple[str, str]:
        """The weight formats of gate and up, and of down."""
        return self.format, self.down_format or self.format

    @property
    def format_name(self) -> str:
        """Both formats as one word, for reports and tables of measured times."""
        return "+".join(dict.fromkeys(self.formats))

    @cached_property
    def packing(self) -> Format:
        """The weight format of gate and up."""
        return format_of(self.format)

    @cached_property
    def down_packing(self) -> Format:
        """The weight format of down."""
        return format_of(self.formats[1])

    @property
    def parameters(self) -> int:
        """Weights of one expert, biases and padding left out."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @cached_property
    def padded_intermediate(self) -> int:
        """F rounded up to whole groups of 32: rows of gate and of up as they are packed."""
        return pad(self.intermediate, GROUP)

    @cached_property
    def up_rows(self) -> int:
        """Rows of the packed up side, gate included."""
        return self.padded_intermediate * (2 if self.gated else 1)

    @cached_property
    def up_strip_bytes(self) -> int:
        """Bytes of one strip of the up side."""
        return self.packing.strip_bytes(self.hidden)

    @cached_property
    def down_strip_bytes(self) -> int:
        """Bytes of one strip of down."""
        return self.down_packing.strip_bytes(self.intermediate)

    @cached_property
    def up_bytes(self) -> int:
        """Bytes of the packed up side, gate included."""
        return packed_bytes(self.up_rows, self.hidden, self.format)

    @cached_property
    def down_bytes(self) -> int:
        """Bytes of packed down."""
        return packed_bytes(self.hidden, self.intermediate, self.formats[1])

    @cached_property
    def down_offset(self) -> int:
        """Where down starts in the block."""
        return pad(self.up_bytes, _LINE)

    @cached_property
    def bias_offset(self) -> int:
        """Where the biases start: up side in packed row order, then down."""
        return pad(self.down_offset + self.down_bytes, _LINE)

    @cached_property
    def down_bias_offset(self) -> int:
        """Where down's bias starts."""
        return self.bias_offset + 4 * self.up_rows

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the block, a multiple of 64."""
        floats = self.up_rows + pad(self.hidden, TILE) if self.bias else 0
        return pad(self.bias_offset + 4 * floats, _LINE)


class ExpertWeights(NamedTuple):
    """One expert in float32: gate and up ``[F, D]``, down ``[D, F]``, biases ``[F]``, ``[D]``."""

    gate: F32 | None
    up: F32
    down: F32
    gate_bias: F32 | None = None
    up_bias: F32 | None = None
    down_bias: F32 | None = None


def interleave(shape: Block, gate: F32 | None, up: F32) -> F32:
    """Rows of gate and up, zero-padded to whole groups, alternating by strips of 16."""
    rows = shape.padded_intermediate
    sides = [side for side in (gate, up) if side is not None]
    padded = np.zeros((len(sides), rows, *up.shape[1:]), np.float32)
    for at, side in enumerate(sides):
        padded[at, : side.shape[0]] = side
    strips = padded.reshape(len(sides), rows // TILE, TILE, *up.shape[1:])
    return np.ascontiguousarray(strips.swapaxes(0, 1)).reshape(shape.up_rows, *up.shape[1:])


def separate(shape: Block, rows: F32) -> tuple[F32 | None, F32]:
    """Inverse of :func:`interleave`."""
    sides = 2 if shape.gated else 1
    strips = rows.reshape(shape.padded_intermediate // TILE, sides, TILE, *rows.shape[1:])
    flat = strips.swapaxes(0, 1).reshape(sides, shape.padded_intermediate, *rows.shape[1:])
    parts = np.ascontiguousarray(flat[:, : shape.intermediate])
    return (parts[0] if shape.gated else None), parts[-1]


def pack_expert(
    shape: Block,
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
        When an array is missing, superfluous or of another shape.
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
    _check_bytes(shape, out)
    pack(interleave(shape, gate, up), shape.format, out[: shape.up_bytes])
    out[shape.up_bytes : shape.down_offset] = 0
    down_end = shape.down_offset + shape.down_bytes
    pack(down, shape.formats[1], out[shape.down_offset : down_end])
    out[down_end:] = 0
    if up_bias is not None and down_bias is not None:
        floats = out[shape.bias_offset :].view(np.float32)
        floats[: shape.up_rows] = interleave(shape, gate_bias, up_bias)
        floats[shape.up_rows : shape.up_rows + d] = down_bias
    return out


def unpack_expert(shape: Block, packed: U8) -> ExpertWeights:
    """Return the float32 weights that the kernels compute with.

    Raises
    ------
    ShapeError
        When ``packed`` is not uint8 ``[shape.block_bytes]``.
    """
    _check_bytes(shape, packed)
    d, f = shape.hidden, shape.intermediate
    gate, up = separate(shape, unpack(packed[: shape.up_bytes], shape.up_rows, d, shape.format))
    down_end = shape.down_offset + shape.down_bytes
    down = unpack(packed[shape.down_offset : down_end], d, f, shape.formats[1])
    if not shape.bias:
        return ExpertWeights(gate, up, down)
    floats = packed[shape.bias_offset :].view(np.float32)
    gate_bias, up_bias = separate(shape, floats[: shape.up_rows])
    return ExpertWeights(
        gate, up, down, gate_bias, up_bias, floats[shape.up_rows : shape.up_rows + d].copy()
    )


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


def _check_bytes(shape: Block, packed: U8) -> None:
    if packed.dtype != np.uint8 or packed.shape != (shape.block_bytes,):
        raise ShapeError(f"the block takes {shape.block_bytes} bytes, got {list(packed.shape)}")
