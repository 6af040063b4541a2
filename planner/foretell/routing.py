"""Gives each token's experts: from a recorded trace, or made up with stated statistics.

The synthetic router adds three terms per expert and keeps the top k: a fixed popularity (normal,
``skew``), a slowly changing preference of the running text (normal, ``locality``, first-order
autoregressive with ``persistence``) and the token's own taste (Gumbel, scale 1). The three are the
model's :class:`~planner.describe.routing_law.RoutingLaw`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.describe.estimate import Source
from planner.describe.model import ModelSpec
from planner.describe.traces import read_trace
from planner.errors import TraceError

RECALL = (0.85, 0.75, 0.65)
"""Share of a layer's experts that its router names 1, 2 and 3 layers early: assumed, after what is
published of reusing the next routers (HybriMoE, arXiv 2504.05897; HOBBIT, arXiv 2411.01433)."""
SAMPLED = 256
"""Prompt tokens drawn one by one; the loads of a longer prompt are these, scaled up."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the router chose in one layer of one step; experts without weights are left out.

    Parameters
    ----------
    ids, weights
        Each activated expert once, ascending, and its routing weight averaged over all tokens of
        the step, so that in prefill popular experts weigh more.
    loads
        The same experts with the tokens they get.
    """

    ids: list[int]
    weights: list[float]
    loads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Routing:
    """The experts chosen for a prompt and the tokens decoded after it.

    Parameters
    ----------
    prompt, prompt_weights
        ``[L, E]`` tokens of all sequences that each expert of each MoE layer gets in prefill, and
        its routing weight averaged over all of the prompt's tokens.
    decode
        ``[T, L, B, A]`` ids chosen at each decode step for each of B sequences.
    weights
        ``[T, L, B, A]`` the router's weights of those choices.
    guess
        ``[M, T, L, B, A]`` what the layers 1, 2, ... M before would have predicted.
    experts
        Experts per layer that have weights; higher ids stand for zero-computation ones.
    source, origin
        Where the choices come from, for the report.
    parts
        ``[P, L, E]`` the same tokens as ``prompt`` by pieces of it, where they are known.
    """

    prompt: NDArray[np.int64]
    prompt_weights: NDArray[np.float64]
    decode: NDArray[np.int64]
    weights: NDArray[np.float32]
    guess: NDArray[np.int64]
    experts: int
    source: Source
    origin: str
    parts: NDArray[np.int64] | None = None

    @cached_property
    def choices(self) -> tuple[list[Choice], ...]:
        """Each step's choices, layer by layer: the prompt's first, then every decode step's."""
        count = self.experts
        layers = zip(
            self.prompt[:, :count].tolist(), self.prompt_weights[:, :count].tolist(), strict=True
        )
        prompt = [_choice(enumerate(loads), weights) for loads, weights in layers]
        steps = zip(self.decode.tolist(), self.weights.tolist(), strict=True)
        return prompt, *(
            [_merge(i, w, count) for i, w in zip(*step, strict=True)] for step in steps
        )

    def in_pieces(self, sizes: Sequence[int]) -> list[list[Choice]]:
        """The choices of a prompt's pieces of ``sizes`` tokens, layer by layer.

        As they are known; otherwise which tokens go to which expert is drawn, always the same.
        """
        parts = self._drawn(sizes) if self.parts is None else self.parts
        weights = (self.prompt_weights[:, : self.experts] / len(sizes)).tolist()
        return [
            [
                _choice(enumerate(loads), of_layer)
                for loads, of_layer in zip(part[:, : self.experts].tolist(), weights, strict=True)
            ]
            for part in parts
        ]

    def _drawn(self, sizes: Sequence[int]) -> NDArray[np.int64]:
        """Deal each layer's loads out to pieces of ``sizes`` tokens, ``[P, L, E]``."""
        rng = np.random.default_rng(0)
        left, tokens = self.prompt.copy(), sum(sizes)
        parts = np.zeros((len(sizes), *left.shape), np.int64)
        for part, size in zip(parts, sizes, strict=True):
            for dealt, loads in zip(part, left, strict=True):
                count = round(int(loads.sum()) * size / tokens)
                dealt[:] = rng.multivariate_hypergeometric(loads, count, method="marginals")
                loads -= dealt
            tokens -= size
        return parts

    def shortened(self, tokens: int) -> Routing:
        """Return the same routing with no more than ``tokens`` decode steps."""
        return replace(
            self,
            decode=self.decode[:tokens],
            weights=self.weights[:tokens],
            guess=self.guess[:, :tokens],
        )

    def expected(self, step: int, layer: int, distance: int) -> NDArray[np.float64]:
        """What a predictor ``distance`` layers early expects of the experts of ``layer``, ``[E]``.

        At decode step ``step`` of one sequence the probability of each being activated, of
        several the tokens each gets; at step -1, the prompt, the tokens each gets.
        """
        recall, count = RECALL[distance - 1], self.prompt.shape[1]
        if step < 0:
            loads = self.prompt[layer].astype(np.float64)
            loads = recall * loads + (1 - recall) * loads.sum() / count
            return np.asarray(loads[: self.experts])
        sequences, top_k = self.decode.shape[2:]
        named = np.bincount(self.guess[distance - 1, step, layer].ravel(), minlength=count)
        rest = (1 - recall) * top_k / self.experts
        belief = (recall - rest) * np.minimum(named, sequences)
        return np.asarray(belief[: self.experts] + sequences * rest)

    def uses(self) -> NDArray[np.int64]:
        """Return how many tokens each expert of each layer gets in all, ``[L, E]``."""
        layers, choices = self.prompt.shape
        decoded = [
            np.bincount(self.decode[:, layer].ravel(), minlength=choices) for layer in range(layers)
        ]
        return self.prompt + np.stack(decoded)


def _choice(loads: Iterable[tuple[int, int]], weights: Sequence[float]) -> Choice:
    used = [(expert, load) for expert, load in loads if load]
    return Choice(
        [expert for expert, _ in used], [weights[expert] for expert, _ in used], tuple(used)
    )


def _merge(ids: list[list[int]], weights: list[list[float]], count: int) -> Choice:
    """Merge the sequences of a batch into one choice."""
    if len(ids) == 1:
        pairs = sorted(pair for pair in zip(ids[0], weights[0], strict=True) if pair[0] < count)
        experts = [expert for expert, _ in pairs]
        return Choice(experts, [weight for _, weight in pairs], tuple((e, 1) for e in experts))
    loads: Counter[int] = Counter()
    total: defaultdict[int, float] = defaultdict(float)
    for row, row_weights in zip(ids, weights, strict=True):
        for expert, weight in zip(row, row_weights, strict=True):
            if expert < count:
                loads[expert] += 1
                total[expert] += weight
    used = sorted(loads.items())
    return Choice([e for e, _ in used], [total[e] / len(ids) for e, _ in used], tuple(used))


def synthetic(model: ModelSpec, prompt: int, tokens: int, batch: int = 1, seed: int = 0) -> Routing:
    """Make up the routing of ``batch`` sequences: the same seed gives the same routing."""
    experts, law = model.experts, model.routing
    layers, choices = model.moe_layers, experts.count + experts.identity
    if not layers:
        return _nothing_routed(tokens, batch)
    rng = np.random.default_rng(seed)
    shape = (batch, layers, choices)
    popularity = np.float32(law.skew) * rng.standard_normal((layers, choices), dtype=np.float32)
    mood = rng.standard_normal(shape, dtype=np.float32)
    fresh = np.float32(np.sqrt(1 - law.persistence**2))
    sampled = min(prompt, SAMPLED)
    scores = np.empty((sampled + tokens, *shape), dtype=np.float32)
    for step in scores:
        new = fresh * rng.standard_normal(shape, dtype=np.float32)
        mood = np.float32(law.persistence) * mood + new
        np.add(popularity, np.float32(law.locality) * mood, out=step)
    # -log(exponential) is Gumbel distributed.
    scores -= np.log(rng.standard_exponential(scores.shape, dtype=np.float32) + np.float32(1e-30))
    ids = np.argpartition(scores, -experts.top_k, axis=-1)[..., -experts.top_k :]
    logits = np.take_along_axis(scores, ids, -1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    routing = _split(
        model,
        ids.transpose(0, 2, 1, 3),
        weights.transpose(0, 2, 1, 3),
        sampled,
        rng,
        Source.ASSUMED,
        f"synthetic routing, seed {seed}: {law.origin}",
    )
    if sampled == prompt:
        return routing
    return replace(routing, prompt=np.rint(routing.prompt * (prompt / sampled)).astype(np.int64))


def _nothing_routed(tokens: int, batch: int) -> Routing:
    """The routing of a model without experts."""
    ids = np.zeros((tokens, 0, batch, 0), np.int64)
    weights, guess = ids.astype(np.float32), np.zeros((len(RECALL), *ids.shape), np.int64)
    loads, shares = np.zeros((0, 0), np.int64), np.zeros((0, 0))
    return Routing(loads, shares, ids, weights, guess, 0, Source.MEASURED, "no experts")


def from_trace(
    path: Path, model: ModelSpec, prompt: int, tokens: int, batch: int = 1, seed: int = 0
) -> Routing:
    """Replay a recorded trace: its first tokens are the prompts, the following are decoded.

    Parameters
    ----------
    path
        An ``.npz`` with ``expert_ids`` ``[T, L, A]`` and ``routing_weights`` of the same shape.

    Raises
    ------
    TraceError
        When the file is damaged, too short, or not of this model.
    """
    ids, weights = read_trace(path)
    experts = model.experts
    _, layers, top_k = ids.shape
    found = (layers, top_k, int(ids.max(initial=0)) + 1)
    choices = experts.count + experts.identity
    for what, have, want in (
        ("MoE layers", found[0], model.moe_layers),
        ("experts per token", found[1], experts.top_k),
    ):
        if have != want:
            raise TraceError(
                f"{path} has {have} {what}, {model.name} has {want}",
                hint="use a trace recorded with this model",
            )
    if found[2] > choices or ids.min(initial=0) < 0:
        raise TraceError(
            f"{path} names expert {found[2] - 1}, {model.name} has experts 0 to {choices - 1}",
            hint="use a trace recorded with this model",
        )
    needed = batch * (prompt + tokens)
    if len(ids) < needed:
        raise TraceError(
            f"{path} has {len(ids)} tokens; {batch} x ({prompt} prompt + {tokens} decoded) "
            f"need {needed}",
            hint="ask for a shorter prompt, or record a longer trace",
        )

    streams = (batch, prompt + tokens, layers, top_k)
    return _split(
        model,
        ids[:needed].reshape(streams).transpose(1, 2, 0, 3),
        weights[:needed].reshape(streams).transpose(1, 2, 0, 3),
        prompt,
        np.random.default_rng(seed),
        Source.MEASURED,
        f"trace {path.name}",
    )


def _split(
    model: ModelSpec,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    prompt: int,
    rng: np.random.Generator,
    source: Source,
    origin: str,
) -> Routing:
    """Cut ``[T, L, B, A]`` choices into a prompt's loads and decode steps with their guesses."""
    choices = model.experts.count + model.experts.identity
    loads = np.zeros((model.moe_layers, choices), dtype=np.int64)
    total = np.zeros(loads.shape)
    for layer in range(model.moe_layers):
        chosen, weighed = ids[:prompt, layer].ravel(), weights[:prompt, layer].ravel()
        loads[layer] = np.bincount(chosen, minlength=choices)
        total[layer] = np.bincount(chosen, weights=weighed, minlength=choices)
    decode = ids[prompt:]
    guess = np.empty((len(RECALL), *decode.shape), dtype=decode.dtype)
    for early, recall in zip(guess, RECALL, strict=True):
        missed = rng.random(decode.shape) >= recall
        early[:] = np.where(missed, rng.integers(0, choices, decode.shape), decode)
    mean = total / (prompt * ids.shape[2])
    count = model.experts.count
    return Routing(loads, mean, decode, weights[prompt:], guess, count, source, origin)
