"""Describes a model to the planner: counts of parameters and cached numbers, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from hybrid.formats.block import PAGE_BYTES, Block
from planner.describe.routing_law import UNPUBLISHED, RoutingLaw
from planner.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """How a layer mixes tokens: attention of some kind, a recurrence, or nothing.

    Parameters
    ----------
    kind
        ``full``, ``sliding``, ``latent`` (multi-head latent attention), ``linear`` (any constant
        state recurrence or convolution) or ``none``.
    params
        Weights of its projections.
    cache_per_token
        Numbers cached per token: keys and values, or the compressed latent.
    window
        Most tokens it keeps, None for all of the context.
    state
        Cached numbers that do not grow with the context.
    score_flops
        Floating-point operations for each (query token, visible token) pair.
    """

    kind: str
    params: int
    cache_per_token: int = 0
    window: int | None = None
    state: int = 0
    score_flops: int = 0

    def cached(self, context: int) -> int:
        """Numbers cached for a sequence of ``context`` tokens."""
        return self.state + self.cache_per_token * self.visible(context)

    def visible(self, context: int) -> int:
        """Tokens a query sees at most."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of one MoE layer.

    Parameters
    ----------
    count
        Experts that have weights.
    top_k
        Experts chosen per token, zero-computation ones included.
    identity
        Zero-computation experts the router may also choose; they are never loaded.
    hidden, intermediate
        Matrix sizes; ``hidden`` is the experts' own input width.
    matrices
        3 when gated (gate, up, down), 2 when not.
    bias
        Whether each matrix has a bias.
    """

    count: int
    top_k: int
    identity: int = 0
    hidden: int
    intermediate: int
    matrices: int = 3
    bias: bool = False

    @property
    def params_each(self) -> int:
        """Weights of one expert."""
        bias = (self.matrices - 1) * self.intermediate + self.hidden if self.bias else 0
        return self.matrices * self.hidden * self.intermediate + bias

    def block(self, fmt: str) -> Block:
        """Return how a store has them in a format, or in two as ``UP+DOWN``."""
        up, _, down = fmt.partition("+")
        return Block(
            hidden=self.hidden,
            intermediate=self.intermediate,
            format=up,
            down_format=down,
            gated=self.matrices == 3,
            bias=self.bias,
        ).on_pages()

    @property
    def real_top_k(self) -> float:
        """Experts with weights a token reads on average, if the router were even-handed."""
        return self.top_k * self.count / max(1, self.count + self.identity)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: its mixer, its dense weights, and the routed experts that follow."""

    mixer: Mixer
    ffn_params: int
    """Dense feed-forward, shared expert, router, norms: everything but mixer and experts."""
    experts: Experts | None

    @property
    def moe(self) -> bool:
        """Whether it has routed experts."""
        return self.experts is not None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model, with experts or without, as far as placing it on a machine needs to know.

    Parameters
    ----------
    name, family
        The user's name for it and its ``model_type``.
    hidden, vocab, context
        Residual width, vocabulary, most tokens of context (None: no stated limit).
    tied
        Whether input embedding and output head share weights.
    layers
        Every decoder layer in order.
    other_params
        Weights outside the decoder layers besides embedding and head (final norm and such).
    routing
        How its routers choose, as far as anybody knows.
    unread
        Fields of the config that seem to tell kinds of layers apart, which nobody reads.
    """

    name: str
    family: str
    hidden: int
    vocab: int
    context: int | None
    tied: bool
    layers: tuple[Layer, ...]
    other_params: int = 0
    routing: RoutingLaw = UNPUBLISHED
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for experts in self.kinds_of_experts:
            if experts.top_k > experts.count + experts.identity:
                raise SpecError(
                    f"{self.name}: top_k {experts.top_k} exceeds its "
                    f"{experts.count + experts.identity} experts",
                    hint="compare with the publisher's config.json",
                )

    @cached_property
    def kinds_of_experts(self) -> tuple[Experts, ...]:
        """What the routed experts of a layer may be, each once; nearly always one."""
        return tuple(dict.fromkeys(self._experts_of_layers))

    @cached_property
    def experts(self) -> Experts:
        """The routed experts of each MoE layer; where layers differ, the most and largest.

        A model without experts has none of no width.
        """
        if not self.kinds_of_experts:
            return Experts(count=0, top_k=0, hidden=self.hidden, intermediate=0)
        first, *others = self.kinds_of_experts
        if not others:
            return first
        most = {
            name: max(getattr(experts, name) for experts in self.kinds_of_experts)
            for name in ("count", "top_k", "identity", "hidden", "intermediate")
        }
        return replace(first, **most)

    @cached_property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(layer.moe for layer in self.layers)

    @property
    def embedding_params(self) -> int:
        """Weights of the input embedding table (one row of it is read per token)."""
        return self.vocab * self.hidden

    @property
    def head_params(self) -> int:
        """Weights of the output head, whether or not it shares the embedding's."""
        return self.vocab * self.hidden

    @property
    def expert_params(self) -> int:
        """Weights of all routed experts."""
        return sum(e.count * e.params_each for e in self._experts_of_layers)

    @property
    def expert_count(self) -> int:
        """Routed experts of all layers."""
        return sum(experts.count for experts in self._experts_of_layers)

    def store_bytes(self, fmt: str) -> int:
        """Bytes of an expert store in a format, to the last: its first page, then every layer."""
        return PAGE_BYTES + sum(e.count * e.block(fmt).stride for e in self._experts_of_layers)

    @property
    def _experts_of_layers(self) -> Iterator[Experts]:
        return (layer.experts for layer in self.layers if layer.experts is not None)

    @cached_property
    def mixer_params(self) -> int:
        """Weights of attention and its relatives."""
        return sum(layer.mixer.params for layer in self.layers)

    @cached_property
    def ffn_params(self) -> int:
        """Dense feed-forward, shared experts, routers and norms."""
        return sum(layer.ffn_params for layer in self.layers)

    @property
    def dense_params(self) -> int:
        """Everything but routed experts: read for every token, or the embedding table."""
        embeddings = self.embedding_params * (1 if self.tied else 2)
        return self.mixer_params + self.ffn_params + embeddings + self.other_params

    @property
    def total_params(self) -> int:
        """All weights, without multi-token-prediction layers and vision towers."""
        return self.dense_params + self.expert_params

    @property
    def active_params(self) -> int:
        """Weights one token's computation reads: all but unchosen experts and the embedding.

        The input embedding is a lookup of one row. Some publishers count it as active.
        """
        active_experts = sum(e.real_top_k * e.params_each for e in self._experts_of_layers)
        lookup = 0 if self.tied else self.embedding_params
        return round(self.dense_params - lookup + active_experts)

    def cached_numbers(self, context: int) -> int:
        """Numbers in the KV cache and recurrent states of one sequence."""
        return sum(layer.mixer.cached(context) for layer in self.layers)
