"""A decoder layer as values and arrays, validated, and how it becomes a record of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cpu_experts.checks import check_floats
from cpu_experts.decoder.delta_layer import Delta
from cpu_experts.decoder.matrices import Matrix, Norm
from cpu_experts.decoder.records import SOFTMAX, SPARSEMIXER
from cpu_experts.kernels.records import Experts, address, fill_record
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import F32, TILE


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a token's experts are chosen and weighed.

    Parameters
    ----------
    matrix
        ``[E, D]``; ``[E + 1, D]`` if ``gated_shared``, the last row's sigmoid weighs the shared
        expert.
    scoring
        One of the constants of :mod:`cpu_experts.decoder.records`.
    correction
        ``[E]``, added to the scores for the choice and not for the weights.
    groups, top_groups, of_group
        Only experts of the ``top_groups`` groups are chosen from whose ``of_group`` best (1 or 2)
        add up to the most.
    normalize, floor
        Divide the weights by their sum, or by ``floor`` if that is larger.
    scale
        Multiplies the weights at the end.
    jitter
        SparseMixer's tolerance.
    """

    matrix: Matrix
    experts: int
    top_k: int
    scoring: int = SOFTMAX
    correction: F32 | None = None
    groups: int = 1
    top_groups: int = 1
    of_group: int = 2
    normalize: bool = False
    floor: float = 0.0
    scale: float = 1.0
    jitter: float = 0.0
    gated_shared: bool = False

    def __post_init__(self) -> None:
        check_floats("correction", self.correction, self.experts)
        rows = self.experts + self.gated_shared
        if self.matrix.rows != rows or not 1 <= self.top_k <= self.experts:
            raise ShapeError(
                f"a router of {self.experts} experts, {self.top_k} a token, takes {rows} rows,"
                f" the matrix has {self.matrix.rows}"
            )
        if self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ShapeError(f"{self.experts} experts in {self.groups} groups, {self.top_groups}")
        if self.scoring == SPARSEMIXER and self.top_k != 2:
            raise ShapeError(f"SparseMixer chooses 2 experts, not {self.top_k}")

    def record(self, threads: int) -> dict[str, Any]:
        """Values of :data:`~cpu_experts.decoder.records.ROUTER`."""
        return {
            "matrix": self.matrix.record(threads),
            "correction": address(self.correction),
            "scoring": self.scoring,
            "experts": self.experts,
            "top_k": self.top_k,
            "groups": self.groups,
            "top_groups": self.top_groups,
            "of_group": self.of_group,
            "normalize": self.normalize,
            "gated_shared": self.gated_shared,
            "floor": self.floor,
            "scale": self.scale,
            "jitter": self.jitter,
        }


@dataclass(frozen=True, kw_only=True)
class Latent:
    """A compressed cache; see :mod:`cpu_experts.decoder.mla`.

    Parameters
    ----------
    rank, rope
        Numbers that a position keeps: the latent, and the key that is turned.
    nope, value
        A head's numbers of a key without and of a value; its query has ``nope + rope``.
    q_norm, q_b
        From what ``q`` of the layer makes to the queries; None where that already is them.
    kv_norm
        Of the latent.
    absorb
        ``[heads * rank, nope]``: every head's part of ``kv_b`` for keys, transposed.
    kv_b
        ``[heads * (nope + value), rank]``; only its rows for values are read.
    apart
        Whether turned neighbours are put half a head apart.
    """

    rank: int
    rope: int
    nope: int
    value: int
    kv_norm: Norm
    absorb: Matrix
    kv_b: Matrix
    q_norm: Norm | None = None
    q_b: Matrix | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        if any(size % TILE for size in (self.rank, self.nope, self.value)) or self.rope % 2:
            raise ShapeError(
                f"a latent of {self.rank}, keys of {self.nope} + {self.rope} and values of"
                f" {self.value}; all but the turned part take multiples of {TILE}"
            )
        if (self.q_norm is None) != (self.q_b is None) or self.kv_b.bias is not None:
            raise ShapeError("compressed queries take a norm and a matrix, kv_b takes no bias")

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """What a token is multiplied with besides the layer's own."""
        return (self.absorb, self.kv_b) if self.q_b is None else (self.q_b, self.absorb, self.kv_b)

    def check(self, layer: Layer) -> None:
        """Raise ShapeError unless the matrices fit the layer's heads."""
        heads, queries = layer.heads, layer.q if self.q_b is None else self.q_b
        found = [queries.rows, layer.k.rows, self.absorb.rows, self.kv_b.rows, layer.o.cols]
        wanted = [heads * (self.nope + self.rope), self.rank + self.rope, heads * self.rank]
        wanted += [heads * (self.nope + self.value), heads * self.value]
        cols = [self.absorb.cols, self.kv_b.cols, self.kv_norm.weight.size]
        if self.q_b is not None and self.q_norm is not None:
            cols += [self.q_b.cols, self.q_norm.weight.size]
        if found != wanted or cols != [
            self.nope,
            *2 * [self.rank],
            *(len(cols) - 3) * [layer.q.rows],
        ]:
            raise ShapeError(f"compressed attention has {found} rows, the heads take {wanted}")
        if layer.head_dim != self.rank + self.rope or layer.v is not None:
            raise ShapeError("a compressed cache holds latent and key, and no values")
        if any((layer.q_norm, layer.k_norm, layer.window, layer.sinks is not None)):
            raise ShapeError("compressed attention takes no norms of heads, windows or sinks")

    def record(self, threads: int) -> dict[str, Any]:
        """Values of :data:`~cpu_experts.decoder.records.LATENT`."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("rank", "rope", "nope", "value", "apart")
        }
        for name in ("q_b", "absorb", "kv_b"):
            matrix = getattr(self, name)
            if matrix is not None:
                values[name] = matrix.record(threads)
        for name in ("q_norm", "kv_norm"):
            norm = getattr(self, name)
            if norm is not None:
                values[name] = norm.record()
        return values


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: ``x += residual * attention(norm(x))``, then the same with the FFN.

    Parameters
    ----------
    norm, ffn_norm
        Before attention and before the experts, ``[D]``.
    q, k, v, o
        Projections, each of its own format.
    heads, kv_heads, head_dim
        Of attention. With a compressed cache all heads see one key of ``head_dim``, and
        ``kv_heads`` are the groups of heads that threads take.
    gated
        Whether every head of ``q`` has a gate behind its query, whose sigmoid attention is
        multiplied with.
    delta
        A gated delta net in attention's place: ``q``, ``k`` and ``v`` are its first products, heads
        and their size those of its values, ``kv_heads`` its key heads.
    latent
        How the cache is compressed; then ``k`` makes what is kept, and there is no ``v``.
    q_norm, k_norm
        ``[head_dim]`` for every head by itself, or as long as the projection for all together.
    sinks
        ``[heads]``, a score that takes part in the softmax and has no value.
    window
        Positions that attention sees, the token itself included; 0 for all.
    scaling
        Multiplies the scores.
    clip
        Bounds queries, keys and values after their norm.
    router, experts
        Both or neither.
    shared
        An expert for every token, or the MLP of a layer without experts.
    """

    norm: Norm
    q: Matrix
    k: Matrix
    o: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    ffn_norm: Norm
    v: Matrix | None = None
    latent: Latent | None = None
    delta: Delta | None = None
    gated: bool = False
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: F32 | None = None
    window: int = 0
    clip: float = math.inf
    residual: float = 1.0
    router: Router | None = None
    experts: Experts | None = None
    shared: Experts | None = None

    def __post_init__(self) -> None:
        into = self.heads * self.head_dim
        wanted = [into * (2 if self.gated else 1), *2 * [self.kv_heads * self.head_dim]]
        found = [matrix.rows for matrix in self.projections]
        if self.latent is not None:
            self.latent.check(self)
        elif self.delta is not None:
            self._check_delta(self.delta)
        elif found != wanted or self.o.cols != into:
            raise ShapeError(f"projections have {found} rows, the heads take {wanted}")
        if self.heads % self.kv_heads:
            raise ShapeError(f"{self.heads} heads do not share {self.kv_heads}")
        check_floats("sinks", self.sinks, self.heads)
        if (self.router is None) != (self.experts is None):
            raise ShapeError("a layer has a router and experts, or neither")
        if self.experts is None and self.shared is None:
            raise ShapeError("a layer needs experts or an MLP")
        for norm, size in ((self.q_norm, into), (self.k_norm, wanted[1])):
            if norm is not None and norm.weight.size not in (self.head_dim, size):
                raise ShapeError(f"a norm of {norm.weight.size} for heads of {self.head_dim}")
            if norm is not None and (norm.centered or norm.bias is not None):
                raise ShapeError("queries and keys take a norm without mean and bias")
        if self.gated and self.q_norm is not None and self.q_norm.weight.size != self.head_dim:
            raise ShapeError("queries with gates take a norm for every head by itself")

    def _check_delta(self, delta: Delta) -> None:
        rows = sum(matrix.rows for matrix in self.projections)
        values = delta.value_heads * delta.value_dim
        if rows != delta.channels + values + 2 * delta.value_heads or self.o.cols != values:
            raise ShapeError(
                f"a gated delta net of {delta.channels} channels, {rows} rows are given"
            )
        if (self.heads, self.kv_heads) != (delta.value_heads, delta.key_heads):
            raise ShapeError(f"{self.heads} heads of {self.kv_heads} are not the delta net's")
        if self.head_dim != delta.value_dim or self.latent is not None or self.window:
            raise ShapeError("a gated delta net has no latent and no window")

    @property
    def projections(self) -> tuple[Matrix, ...]:
        """What the normed hidden state is multiplied with."""
        return (self.q, self.k) if self.v is None else (self.q, self.k, self.v)

    @property
    def stored(self) -> tuple[int, int, int]:
        """Heads of the cache, their size, and how much of it is a compressed cache's key."""
        if self.latent is None:
            return self.kv_heads if self.delta is None else self.heads, self.head_dim, 0
        return 1, self.head_dim, self.latent.rope

    def fill(self, record: Any, threads: int) -> None:
        """Write the layer into a record of :data:`~cpu_experts.decoder.records.LAYER`."""
        for name in ("norm", "q_norm", "k_norm", "ffn_norm"):
            norm = getattr(self, name)
            if norm is not None:
                fill_record(record[name], norm.record())
        for name in ("q", "k", "v", "o", "router", "latent", "delta", "experts", "shared"):
            part = getattr(self, name)
            if part is not None:
                fill_record(record[name], part.record(threads))
        for name in (
            "heads",
            "kv_heads",
            "head_dim",
            "window",
            "gated",
            "scaling",
            "clip",
            "residual",
        ):
            record[name] = getattr(self, name)
        record["sinks"] = address(self.sinks)
