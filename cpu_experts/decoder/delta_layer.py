"""A gated delta net as values and arrays, validated, and how it becomes a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpu_experts.checks import check_floats, check_matrix
from cpu_experts.decoder.matrices import Norm
from cpu_experts.kernels.records import address
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import F32, TILE


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a gated delta net's numbers lie in a layer's first products.

    ``q``, ``k``, ``v``, ``z``, ``b`` and ``a`` are those of the first key head, a ``_step`` is how
    far the next head's are behind (``b`` moves as ``a`` does).
    """

    q: int
    q_step: int
    k: int
    k_step: int
    v: int
    v_step: int
    z: int
    z_step: int
    b: int
    a: int
    a_step: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A gated delta net; see :mod:`cpu_experts.decoder.delta`.

    Parameters
    ----------
    key_heads, value_heads, key_dim, value_dim
        As many value heads as there are share each key head.
    places
        Where their numbers lie.
    conv, bias
        ``[taps, channels]`` and ``[channels]``: queries, keys and values, head by head.
    forgets
        ``[value_heads]``, below 0: what a softplus is multiplied with to the logarithm of what a
        memory keeps.
    steps
        ``[value_heads]``, added inside that softplus.
    norm
        Of what is read, before its gate.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    places: Places
    conv: F32
    forgets: F32
    steps: F32
    norm: Norm
    bias: F32 | None = None

    def __post_init__(self) -> None:
        sizes = (self.key_dim, self.value_dim)
        if self.value_heads % self.key_heads or any(size % TILE for size in sizes):
            raise ShapeError(
                f"{self.key_heads} key heads of {self.key_dim} and {self.value_heads} value heads"
                f" of {self.value_dim}; heads share evenly, sizes are multiples of {TILE}"
            )
        check_matrix("conv", self.conv, (None, self.channels))
        check_floats("bias", self.bias, self.channels)
        check_floats("forgets", self.forgets, self.value_heads)
        check_floats("steps", self.steps, self.value_heads)
        if (
            self.norm.weight.size != self.value_dim
            or self.norm.centered
            or self.norm.bias is not None
        ):
            raise ShapeError(f"a memory of {self.value_dim} takes a norm without mean and bias")

    @property
    def channels(self) -> int:
        """Numbers that pass the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def taps(self) -> int:
        """Inputs that the convolution sees."""
        return int(self.conv.shape[0])

    @property
    def scratch(self) -> int:
        """Float32 that a thread needs."""
        shared = self.value_heads // self.key_heads
        return 2 * self.key_dim + (shared + 3) * self.value_dim

    def record(self, _: int) -> dict[str, Any]:
        """Values of :data:`~cpu_experts.decoder.records.DELTA`."""
        names = ("key_heads", "value_heads", "key_dim", "value_dim", "taps", "channels")
        return {
            **{name: getattr(self, name) for name in names},
            **vars(self.places),
            "conv": address(self.conv),
            "bias": address(self.bias),
            "forgets": address(self.forgets),
            "steps": address(self.steps),
            "norm": address(self.norm.weight),
            "eps": self.norm.eps,
        }
