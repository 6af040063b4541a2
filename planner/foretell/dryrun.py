"""What a model will do on a machine: one run as the runtime would do it, and what else could be.

The dry run simulates the request with the runtime's own decisions, then the same routing with
the rules other systems use, with an oracle's cache, and with one thing changed at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.cost.cost import CostModel
from planner.decide.baselines import all_cpu, on_demand, static_split
from planner.decide.cache import ExpertCache
from planner.decide.director import Scheduler
from planner.decide.oracles import Belady
from planner.decide.policies import policy
from planner.decide.policies.lru import LRU
from planner.decide.policies.static import StaticPopularity
from planner.decide.policy import Ids, Policy, Values
from planner.decide.schedule import schedule
from planner.describe.estimate import Estimate, Source, weakest
from planner.describe.model import Layer, ModelSpec
from planner.describe.terms import CALL, CPU, DECIDING, DISK, GPU, HEAD, JOINING, LINK, MIXER, TERMS
from planner.foretell import advice
from planner.foretell.memory import Fit
from planner.foretell.request import Request
from planner.foretell.routing import Routing
from planner.foretell.run import Run
from planner.foretell.simulate import Simulator

RECORDED = 4
"""Decode steps whose events are kept for the timeline, after the prompt's."""
COMPARED_LAYERS = 4
"""Layers that stand for all when other rules and requests are compared with ours."""
COMPARED_TOKENS = 12
"""Decode steps of those comparisons."""
_BAND = 2 * 1.645
"""Standard deviations from end to end of a band that holds nine of ten."""
WORTHWHILE = 1.01
"""A change is named when it makes tokens at least this many times as fast."""


@dataclass(frozen=True)
class Rule:
    """A way to place and keep experts.

    Parameters
    ----------
    name, meaning
        For the report.
    scheduler
        Places one layer's experts.
    policy
        Makes the cache policy for a routing.
    prefetch, refill
        What idle link time is used for; see ``Simulator``.
    """

    name: str
    meaning: str
    scheduler: Scheduler
    policy: Callable[[Request, Routing], Policy]
    prefetch: bool = False
    refill: bool = False

    def run(
        self,
        request: Request,
        placed: Fit,
        routing: Routing,
        record: int = 0,
        shares: Sequence[float] | None = None,
    ) -> Run:
        """Simulate ``request`` under this rule; slots start with what the policy values most."""
        cost = request.cost
        cache = None
        if cost.on_gpu and request.model.moe_layers:
            cache = ExpertCache(self.policy(request, routing), placed.slots)
            moe = [i for i, layer in enumerate(request.model.layers) if layer.moe]
            for number, index in enumerate(moe):
                if shares is None or shares[index]:
                    for expert in cache.favourites(number):
                        cache.admit(number, expert)
        simulator = Simulator(
            cost,
            placed,
            routing,
            cache,
            self.scheduler,
            prefetch=self.prefetch,
            refill=self.refill,
            record=record,
            shares=shares,
        )
        return simulator.simulate(request.prompt, request.batch)


def _asked(request: Request, routing: Routing) -> Policy:
    model = request.model
    return policy(request.policy, model.moe_layers, model.experts.count, request.known)


def _lru(request: Request, routing: Routing) -> Policy:
    return LRU(request.model.moe_layers, request.model.experts.count)


def _popular(request: Request, routing: Routing) -> Policy:
    count = request.model.experts.count
    return StaticPopularity(request.model.moe_layers, count, routing.uses())


class _Hindsight(Belady):
    """Belady's oracle over the decode steps; what the prompt uses tells it nothing."""

    def __init__(self, decode: NDArray[np.int64], experts: int) -> None:
        # The prompt's step stands first and repeats the first decode step's choice.
        super().__init__(np.concatenate([decode[:1], decode]), experts)

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        prompt = self._step[layers] < 0
        super().observe(layers, self._trace[0, layers] if prompt.all() else ids, weights, tokens)

    def value(self, layers: Ids) -> Values:
        if (self._step[layers] >= 0).all():
            return super().value(layers)
        # Before the prompt it knows the future already, so the slots start with the best.
        first: Values = -self._ahead[0, layers].astype(np.float64)
        return first


def _hindsight(request: Request, routing: Routing) -> Policy:
    return _Hindsight(np.sort(routing.decode[:, :, 0], axis=-1), request.model.experts.count)


OURS = Rule(
    "hybrid",
    "exact schedule, learned cache, prefetch",
    schedule,
    _asked,
    prefetch=True,
    refill=True,
)
RULES = (
    Rule("all CPU", "every expert on the CPU", all_cpu, _popular),
    Rule("on demand", "all on the GPU, LRU cache", on_demand, _lru),
    Rule("static split", "the most used on the GPU, in hindsight", static_split, _popular),
    Rule(
        "oracle cache",
        "ours, knowing the future",
        schedule,
        _hindsight,
        prefetch=True,
        refill=True,
    ),
)


@dataclass(frozen=True)
class Alternative:
    """The same request under other rules."""

    name: str
    meaning: str
    ttft_s: float
    tpot_s: float
    hit_rate: float


@dataclass(frozen=True)
class Change:
    """One thing changed in the request, and what comes of it."""

    what: str
    ttft_s: float
    tpot_s: float
    changes_output: bool
    """Whether the model's answers change: other weight formats do that."""


@dataclass(frozen=True)
class Prediction:
    """What a model that fits will do.

    Parameters
    ----------
    routing_source, routing_origin
        Where the choice of experts comes from.
    run
        The simulated run with the runtime's own decisions.
    ttft, tpot
        Time to the first token, and per output token.
    terms, prefill_terms
        What a decode step and the prompt consist of; they add up to ``tpot`` and ``ttft``.
    binding
        The resource that the largest term of decode waits for.
    alternatives
        Other rules on the same routing.
    why
        Reasons for the placement of some experts.
    changes
        The changes that help most, best first.
    """

    routing_source: Source
    routing_origin: str
    run: Run
    ttft: Estimate
    tpot: Estimate
    terms: dict[str, Estimate]
    prefill_terms: dict[str, Estimate]
    binding: str
    alternatives: tuple[Alternative, ...]
    why: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class PlanResult:
    """The answer to a ``Request``.

    Parameters
    ----------
    request, fit
        What was asked, and how it lies in memory.
    prediction
        What it will do; None when it does not fit.
    remedies
        When it does not fit: what does.
    """

    request: Request
    fit: Fit
    prediction: Prediction | None
    remedies: tuple[str, ...] = ()


def dry_run(request: Request) -> PlanResult:
    """Answer ``request``.

    Raises
    ------
    SpecError, CostError, TraceError
        When lengths contradict the model, a duration is missing, or the trace is not the model's.
    """
    placed = request.fit()
    if not placed.fits:
        return PlanResult(request, placed, None, tuple(advice.remedies(request)))
    routing = request.routing()
    cost = request.cost
    run = OURS.run(request, placed, routing, record=RECORDED)
    terms = estimates(cost, run.decode_terms(), request.batch)
    prefill = estimates(cost, run.prefill.terms, request.prompt * request.batch)
    comparison = _Comparison(request, placed, routing, run)
    prediction = Prediction(
        routing_source=routing.source,
        routing_origin=routing.origin,
        run=run,
        ttft=_total(prefill, routing.source),
        tpot=_total(terms, routing.source, comparison.routing_error_s()),
        terms=terms,
        prefill_terms=prefill,
        binding=advice.binding_resource(cost, run.decode_terms(), request.batch),
        alternatives=tuple(comparison.alternatives()),
        why=tuple(advice.explain(run, cost)),
        changes=tuple(comparison.best_changes()),
    )
    return PlanResult(request, placed, prediction)


def estimates(cost: CostModel, terms: Mapping[str, float], tokens: int) -> dict[str, Estimate]:
    """Give each term the source and the relative error of the durations it is made of."""
    experts = cost.experts
    last = cost.model.layers[-1]
    like: dict[str, Callable[[], Estimate]] = {
        MIXER: lambda: cost.mixer(last, tokens, tokens),
        DECIDING: lambda: cost.deciding(tokens),
        JOINING: lambda: cost.joining(tokens),
        CPU: lambda: experts.cpu_call_estimate(tokens),
        GPU: lambda: experts.gpu_estimate(1),
        LINK: experts.copy_estimate,
        DISK: cost.disk_read,
        HEAD: lambda: cost.head(1, tokens),
        CALL: lambda: cost.call(tokens),
    }
    found = {}
    for term in TERMS:
        value = terms.get(term, 0.0)
        made_of = like.get(term, lambda: cost.ffn(last, tokens))() if value else None
        if made_of is None:
            found[term] = Estimate(0.0, Source.MEASURED, 0.0)
            continue
        error = made_of.error
        if error is not None:
            error = error / made_of.value * value if made_of.value else None
        found[term] = Estimate(value, made_of.source, error)
    return found


def _total(terms: dict[str, Estimate], routing: Source, error_s: float = 0.0) -> Estimate:
    """Sum of the terms; no more certain than the routing that led to them, which adds its error."""
    total = sum(terms.values(), Estimate(0.0, Source.MEASURED, 0.0))
    error = None if total.error is None else math.hypot(total.error, error_s)
    return Estimate(total.value, weakest(total.source, routing), error)


class _Comparison:
    """Runs under other rules and other requests, each scaled by how ours does on the same layers.

    A few layers of each kind stand for all: what is compared is the ratio.
    """

    def __init__(self, request: Request, placed: Fit, routing: Routing, ours: Run) -> None:
        self.request = request
        self.placed = placed
        self.routing = routing.shortened(COMPARED_TOKENS)
        self.shares = _sample(request.model)
        few = OURS.run(request, placed, self.routing, shares=self.shares)
        self._ttft_ratio = ours.ttft_s / few.ttft_s
        self._tpot_ratio = ours.tpot_s / few.tpot_s
        self._tpot_s = ours.tpot_s

    def _times(self, run: Run) -> tuple[float, float]:
        return run.ttft_s * self._ttft_ratio, run.tpot_s * self._tpot_ratio

    def routing_error_s(self) -> float:
        """Return what a token's time may be off because the router's habits are assumed, in s.

        One standard deviation, of the band between the laws that the model's may be.
        """
        request = self.request
        nothing_drawn = request.trace is not None or not request.model.moe_layers
        if request.hardware.gpu is None or nothing_drawn:
            return 0.0
        found = []
        for law in request.model.routing.between:
            other = replace(request, model=replace(request.model, routing=law))
            drawn = other.routing().shortened(COMPARED_TOKENS)
            run = OURS.run(request, self.placed, drawn, shares=self.shares)
            found.append(self._times(run)[1])
        return abs(found[1] - found[0]) / _BAND

    def alternatives(self) -> Iterator[Alternative]:
        """Run the rules of other systems, and ours with a cache that knows the future."""
        if self.request.hardware.gpu is None or not self.request.model.moe_layers:
            return
        for rule in RULES:
            if rule.policy is _hindsight and not _is_regular(self.request):
                continue
            run = rule.run(self.request, self.placed, self.routing, shares=self.shares)
            yield Alternative(rule.name, rule.meaning, *self._times(run), run.hit_rate)

    def best_changes(self) -> list[Change]:
        """Try one change at a time; return the three that speed decoding up the most."""
        found = []
        for what, changes_output, changed in advice.variants(self.request):
            placed = changed.fit()
            if not placed.fits:
                continue
            run = OURS.run(changed, placed, self.routing, shares=self.shares)
            ttft_s, tpot_s = self._times(run)
            if self._tpot_s / tpot_s >= WORTHWHILE:
                found.append(Change(what, ttft_s, tpot_s, changes_output))
        return sorted(found, key=lambda change: change.tpot_s)[:3]


def _sample(model: ModelSpec) -> list[float]:
    """Choose evenly spaced layers of each kind, and how many layers each stands for."""
    kinds: dict[Layer, list[int]] = {}
    for index, layer in enumerate(model.layers):
        kinds.setdefault(layer, []).append(index)
    shares = [0.0] * len(model.layers)
    for indices in kinds.values():
        kept = max(1, round(COMPARED_LAYERS * len(indices) / len(model.layers)))
        for number in range(kept):
            shares[indices[(2 * number + 1) * len(indices) // (2 * kept)]] = len(indices) / kept
    return shares


def _is_regular(request: Request) -> bool:
    """Whether every decode step activates the same number of experts, as oracles need."""
    return request.batch == 1 and not request.model.experts.identity
