"""How a packed expert lies in a slot: the numbers that kernels and devices need, nothing more.

A block holds the up side, then ``down``, then the biases in float32. Every matrix is a row of
strips of 16 output rows; where there is a gate, its strips and those of up alternate (gate
first). One strip is a row of units:

========  ================  ==================================================================
format    one unit          what it holds
========  ================  ==================================================================
``q4_0``  288 B, 32 inputs  four 64-byte chunks, then the 16 rows' float16 scales. Byte
                            ``4 r + b`` of chunk ``j``: input ``4 j + b`` of row ``r`` in the
                            low nibble, input ``16 + 4 j + b`` in the high one; d (q - 8)
``q8_0``  544 B, 32 inputs  eight 64-byte chunks of int8, then the scales. Byte ``4 r + b`` of
                            chunk ``j``: input ``4 j + b`` of row ``r``; d q
``bf16``  32 B, 1 input     16 bfloat16, one a row
``f32``   64 B, 1 input     16 float32, one a row
========  ================  ==================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from gpu_experts.errors import ShapeError

GROUP = 32
TILE = 16
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")

#: Bytes of one unit of a strip, and how many inputs it holds.
UNITS = {
    "q4_0": (TILE * (GROUP // 2 + 2), GROUP),
    "q8_0": (TILE * (GROUP + 2), GROUP),
    "bf16": (TILE * 2, 1),
    "f32": (TILE * 4, 1),
}
QUANTIZED = ("q4_0", "q8_0")


def pad(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


def strip_bytes(cols: int, fmt: str) -> int:
    """Bytes of one strip of 16 rows and ``cols`` inputs."""
    size, inputs = UNITS[fmt]
    return size * (pad(cols, inputs) // inputs)


class PackedShape(Protocol):
    """Whatever describes a packed expert by these names, such as the CPU kernels' shape."""

    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def gated(self) -> bool: ...
    @property
    def activation(self) -> str: ...
    @property
    def alpha(self) -> float: ...
    @property
    def limit(self) -> float: ...
    @property
    def up_offset(self) -> float: ...
    @property
    def bias(self) -> bool: ...
    @property
    def up_strip_bytes(self) -> int: ...
    @property
    def down_offset(self) -> int: ...
    @property
    def down_strip_bytes(self) -> int: ...
    @property
    def bias_offset(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Sizes, offsets and arithmetic of the experts that a device's slots hold.

    An expert maps a token ``x`` ``[D]`` to ``down(act(gate(x)) * (up(x) + up_offset))``, or to
    ``down(act(up(x)))`` without a gate.

    Parameters
    ----------
    hidden, intermediate
        D and F.
    format
        ``q4_0``, ``q8_0``, ``bf16`` or ``f32``.
    gated
        Whether there is a gate projection beside up.
    activation
        One of :data:`ACTIVATIONS`, applied to gate (to up when not gated).
    limit
        Clamp, before the activation: gate from above, up from both sides.
    alpha
        ``silu`` means ``g * sigmoid(alpha * g)``.
    up_offset
        Added to up after the clamp.
    bias
        Whether the projections have biases.
    stride
        Bytes from one expert to the next in the store, and from one slot to the next.
    up_strip_bytes, down_strip_bytes
        Bytes of one strip of 16 rows of the up side and of down.
    down_offset, bias_offset
        Where down and the biases start in a block; ``bias_offset`` is -1 without biases.

    Raises
    ------
    ShapeError
        When the numbers contradict each other or the kernels cannot read such a block.
    """

    hidden: int
    intermediate: int
    format: str
    gated: bool = True
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0
    bias: bool = False
    stride: int
    up_strip_bytes: int
    down_offset: int
    down_strip_bytes: int
    bias_offset: int = -1

    @classmethod
    def of(cls, shape: PackedShape, stride: int) -> BlockLayout:
        """Return the layout of blocks that ``shape`` describes, ``stride`` bytes apart."""
        return cls(
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            format=shape.format,
            gated=shape.gated,
            activation=shape.activation,
            alpha=shape.alpha,
            limit=shape.limit,
            up_offset=shape.up_offset,
            bias=shape.bias,
            stride=stride,
            up_strip_bytes=shape.up_strip_bytes,
            down_offset=shape.down_offset,
            down_strip_bytes=shape.down_strip_bytes,
            bias_offset=shape.bias_offset if shape.bias else -1,
        )

    def __post_init__(self) -> None:
        if self.format not in UNITS:
            raise ShapeError(
                f"unknown weight format {self.format!r}", hint=f"choose one of: {', '.join(UNITS)}"
            )
        if self.activation not in ACTIVATIONS:
            raise ShapeError(
                f"unknown activation {self.activation!r}",
                hint=f"choose one of: {', '.join(ACTIVATIONS)}",
            )
        for name, cols in (("up", self.hidden), ("down", self.intermediate)):
            said, takes = getattr(self, f"{name}_strip_bytes"), strip_bytes(cols, self.format)
            if said != takes:
                raise ShapeError(
                    f"a {self.format} strip of {cols} inputs takes {takes} bytes,"
                    f" {name}_strip_bytes is {said}"
                )
        up_bytes = self.up_rows // TILE * self.up_strip_bytes
        if self.down_offset < up_bytes:
            raise ShapeError(
                f"down starts at byte {self.down_offset}, inside the {up_bytes} bytes of up"
            )
        if self.bias != (self.bias_offset >= 0):
            raise ShapeError(f"bias is {self.bias}, bias_offset is {self.bias_offset}")
        if self.bias and self.bias_offset < self.down_offset + self._down_bytes:
            raise ShapeError(
                f"the biases start at byte {self.bias_offset}, inside down's"
                f" {self._down_bytes} bytes from {self.down_offset}"
            )
        for name in ("stride", "down_offset", "bias_offset"):
            if getattr(self, name) % 16 and getattr(self, name) != -1:
                raise ShapeError(f"{name} is {getattr(self, name)}, not a multiple of 16")
        if self.stride < self.block_bytes:
            raise ShapeError(f"a block takes {self.block_bytes} bytes, the stride is {self.stride}")

    @property
    def quantized(self) -> bool:
        """Whether the weights have groups and scales."""
        return self.format in QUANTIZED

    @cached_property
    def padded_intermediate(self) -> int:
        """F rounded up to whole groups of 32: rows of gate and of up as they are packed."""
        return pad(self.intermediate, GROUP)

    @cached_property
    def up_rows(self) -> int:
        """Rows of the packed up side, gate included."""
        return self.padded_intermediate * (2 if self.gated else 1)

    @cached_property
    def _down_bytes(self) -> int:
        return pad(self.hidden, TILE) // TILE * self.down_strip_bytes

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block, without what fills it up to the stride; a multiple of 16."""
        if not self.bias:
            return self.down_offset + self._down_bytes
        return self.bias_offset + 4 * (self.up_rows + pad(self.hidden, TILE))

    @cached_property
    def parameters(self) -> int:
        """Weights of one expert, biases and padding left out."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate
