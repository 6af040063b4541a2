"""Measures how long deciding takes, how good plans and caches are (``hybrid bench planner``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware
from hybrid.bench.record import Told, provenance, spread, untold
from planner.cost.cost import CostModel, ExpertCost
from planner.decide import policies
from planner.decide.baselines import BASELINES
from planner.decide.cache import ExpertCache
from planner.decide.capacity import hits_by_capacity, marginal_capacities
from planner.decide.decode_table import DecodeTable
from planner.decide.director import Decision, Director, Fill
from planner.decide.oracles import SCH, Belady
from planner.decide.policies.mrs import MRS
from planner.decide.policies.static import StaticPopularity
from planner.decide.policy import Policy
from planner.decide.problem import LayerCost
from planner.decide.replay import Admission, replay
from planner.decide.schedule import schedule
from planner.describe.estimate import LayerWork
from planner.describe.traces import read_trace
from planner.foretell.request import Request
from planner.foretell.simulate import Simulator

MODEL, HARDWARE, FORMAT = "Qwen3-30B-A3B", "rtx4060-laptop-8gb", "q4_0"
"""Whose durations are scheduled: 128 experts, 8 of them a token."""

RESIDENT_SHARE = 0.25
SHARES = (0.25, 0.5)
"""Slots per layer over experts, for the cache policies."""

LEARNED_SHARE = 0.25
"""First part of a trace that static popularity and marginal capacities are taken from."""

TEXTBOOK = ("lru", "lfu", "arc", "static")
"""Policies that are there for comparison: where every miss gets one of equally many slots."""

STEP_SHARE = 10
"""One decode step, of as many decisions as the model has layers, for so many timed decisions."""

WARM_UP = 10
"""Decisions made before the timed ones."""

Progress = Callable[[str], None]


def run_planner_bench(
    traces: Sequence[Path] = (),
    *,
    tokens: int | None = None,
    repeat: int = 200,
    instances: int = 200,
    seed: int = 0,
    progress: Progress = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure the planner and return one record.

    Parameters
    ----------
    traces
        Routing traces (``.npz``) to replay through the cache policies; none skips that part.
    tokens
        Replay only the first tokens of each trace; all by default.
    repeat
        Timed decisions a case.
    instances
        Random layers a size whose plans are compared with their lower bounds.
    seed
        Of the random layers.
    progress
        Called with a line about what is done next.
    finished
        Called with the record so far and a line after every row of it.

    Returns
    -------
    dict
        ``decisions``: seconds to plan one layer, by case. ``steps``: seconds of all that is
        decided in one layer of a decode step, by layers looked ahead. ``gaps``: distance of
        plans from their lower bound and from the best baseline, by number of experts.
        ``caches``: hit rates by trace, capacity and policy, each also as a fraction of Belady's
        under the same rule.
    """
    found = [(path, *read_trace(path)) for path in traces]
    cost = ExpertCost(find_model(MODEL).spec, find_hardware(HARDWARE), FORMAT)
    parts: dict[str, list[dict[str, Any]]] = {
        "decisions": [],
        "steps": [],
        "gaps": [],
        "caches": [],
    }
    record = provenance("hybrid bench planner", 1) | {
        "model": MODEL,
        "hardware": HARDWARE,
        "format": FORMAT,
        **parts,
        "cache_method": (
            "One cache per layer, starting empty, all with the same number of slots unless "
            "'marginal'; tokens replayed one by one over all sequences without a break; a hit is "
            "an activated expert that was resident before its step; rates over all layers "
            "together. 'always': every miss gets a slot. 'worth': a miss gets one only if its "
            f"policy prefers it. Static counts and marginal capacities come from the first "
            f"{LEARNED_SHARE:.0%} of the same trace."
        ),
    }

    def measure(part: str, rows: Iterable[dict[str, Any]], in_words: Callable[..., str]) -> None:
        for row in rows:
            parts[part].append(row)
            finished(record, in_words(row))

    progress("timing decisions")
    measure("decisions", _decisions(cost, repeat, seed), _decision_in_words)
    progress("timing whole steps")
    steps = (_steps(ahead, -(-repeat // STEP_SHARE), seed) for ahead in (0, 3))
    measure("steps", steps, _step_in_words)
    progress("comparing plans with their bounds")
    measure("gaps", _gaps(cost, instances, seed), _gap_in_words)
    for path, ids, weights in found:
        rows = _caches(path.name, ids[:tokens], weights[:tokens], progress)
        measure("caches", rows, _cache_in_words)
    return record


def _decision_in_words(row: dict[str, Any]) -> str:
    micros = row["seconds_median"] * 1e6
    return f"{row['case']}, {row['experts']} experts, {row['tokens']} tokens: {micros:.1f} us"


def _step_in_words(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['ahead']} layers ahead: {row['seconds_median'] * 1e6:.1f} us"


def _gap_in_words(row: dict[str, Any]) -> str:
    gaps = f"{row['gap_mean']:.2%} from the bound, {row['gap_max']:.2%} at most"
    return f"plans of {row['experts']} experts: {gaps}"


def _cache_in_words(row: dict[str, Any]) -> str:
    name = f"{row['trace']}: {row['policy']}, {row['share']:.0%}, {row['capacities']}"
    return f"{name}, {row['admission']}: {row['hit_rate']:.1%} hits"


def _layers(
    rng: np.random.Generator, experts: int, tokens: int | None, count: int
) -> Iterator[tuple[LayerWork, frozenset[int]]]:
    """Yield ``count`` layers: skewed loads of ``tokens`` tokens, or one token an expert."""
    for layer in range(count):
        loads = np.ones(experts, dtype=np.int64)
        if tokens is not None:
            share = rng.pareto(1.2, experts) + 0.05
            loads = np.maximum(1, np.rint(tokens * share / share.sum()).astype(np.int64))
        resident = rng.permutation(experts)[: round(RESIDENT_SHARE * experts)]
        yield LayerWork(layer, tuple(enumerate(loads.tolist()))), frozenset(resident.tolist())


def _decisions(cost: ExpertCost, repeat: int, seed: int) -> Iterator[dict[str, Any]]:
    table = DecodeTable(cost, 8)
    busy = DecodeTable(cost, 8, link_free_s=cost.copy_s())
    from_schedule = partial(_schedule, cost)
    cases: list[tuple[str, int, int | None, Callable[[LayerWork, frozenset[int]], object]]] = [
        ("decode, from the table", 8, None, partial(_look_up, table)),
        ("decode, link busy, not in the table", 8, None, partial(_look_up, busy)),
        ("prefill, unequal loads", 128, 128, from_schedule),
        ("prefill, unequal loads", 128, 4096, from_schedule),
    ]
    for name, experts, tokens, decide in cases:
        samples = []
        layers = _layers(np.random.default_rng(seed), experts, tokens, WARM_UP + repeat)
        for work, residency in layers:
            start = time.perf_counter()
            decide(work, residency)
            samples.append(time.perf_counter() - start)
        yield {"case": name, "experts": experts, "tokens": tokens or 1} | spread(samples[WARM_UP:])


def _steps(ahead: int, tokens: int, seed: int) -> dict[str, Any]:
    """Time the director through a simulated decode: ``place`` and ``fill`` of every layer."""
    model, hardware = find_model(MODEL).spec, find_hardware(HARDWARE)
    warm = 2
    request = Request(model=model, hardware=hardware, prompt=32, tokens=warm + tokens, seed=seed)
    placed, routing = request.fit(), request.routing()
    policy = policies.policy(policies.DEFAULT_POLICY, model.moe_layers, model.experts.count)
    cache = ExpertCache(policy, placed.slots)
    for layer in range(model.moe_layers):
        for expert in cache.favourites(layer):
            cache.admit(layer, expert)
    simulator = Simulator(request.cost, placed, routing, cache)
    timed = simulator.director = _Timed(request.cost, cache)
    timed.ahead = ahead
    simulator.simulate(request.prompt)
    samples = timed.samples_s[(1 + warm) * model.moe_layers :]
    shape = {"experts": model.experts.count, "top_k": model.experts.top_k, "ahead": ahead}
    return {"case": "place and fill"} | shape | spread(samples)


class _Timed(Director):
    """Notes how long it takes over each layer."""

    ahead = 3
    samples_s: list[float]

    def __init__(self, cost: CostModel, cache: ExpertCache) -> None:
        super().__init__(cost, cache)
        self.samples_s = []

    def place(self, *args: Any, **times: Any) -> Decision:
        start = time.perf_counter()
        decision = super().place(*args, **times)
        self.samples_s.append(time.perf_counter() - start)
        return decision

    def fill(
        self,
        decision: Decision,
        ahead: Sequence[tuple[int, NDArray[np.float64]]],
        idle_s: Sequence[float],
    ) -> tuple[Fill, ...]:
        start = time.perf_counter()
        fills = super().fill(decision, ahead[: self.ahead], idle_s)
        self.samples_s[-1] += time.perf_counter() - start
        return fills


def _look_up(table: DecodeTable, work: LayerWork, residency: frozenset[int]) -> object:
    ids = work.expert_ids
    return table.plan(
        work, [e for e in ids if e in residency], [e for e in ids if e not in residency]
    )


def _schedule(cost: LayerCost, work: LayerWork, residency: frozenset[int]) -> object:
    return schedule(work, residency, cost)


def _gaps(cost: ExpertCost, instances: int, seed: int) -> Iterator[dict[str, Any]]:
    for experts in (8, 16, 32, 64, 128):
        gaps, gains = [], []
        rng = np.random.default_rng(seed)
        for work, residency in _layers(rng, experts, 16 * experts, instances):
            plan = schedule(work, residency, cost)
            best = min(other(work, residency, cost).makespan_s for other in BASELINES)
            gaps.append(plan.gap)
            gains.append(best / plan.makespan_s)
        yield {
            "experts": experts,
            "instances": instances,
            "gap_mean": mean(gaps),
            "gap_max": max(gaps),
            "proven_optimal": sum(gap == 0 for gap in gaps) / instances,
            "best_baseline_over_ours_mean": mean(gains),
            "best_baseline_over_ours_max": max(gains),
        }


def _caches(
    trace: str, ids: NDArray[np.int64], weights: NDArray[np.float32], progress: Progress
) -> Iterator[dict[str, Any]]:
    _, layers, _ = ids.shape
    experts = int(ids.max()) + 1
    sample = max(1, round(LEARNED_SHARE * len(ids)))
    every = np.arange(layers)[None, :, None]
    counts = np.zeros((layers, experts))
    np.add.at(counts, (np.broadcast_to(every, ids[:sample].shape), ids[:sample]), 1)
    curve = hits_by_capacity(MRS(layers, experts), ids[:sample], weights[:sample])
    make: dict[str, Callable[[], Policy]] = {
        "belady": lambda: Belady(ids, experts),
        "sch": lambda: SCH(ids, experts),
        **{name: partial(policies.policy, name, layers, experts) for name in policies.names()},
        "static": lambda: StaticPopularity(layers, experts, counts),
    }
    ours = [name for name in policies.names() if name not in TEXTBOOK]
    for share in SHARES:
        equal = (round(share * experts),) * layers
        marginal = marginal_capacities(curve, sum(equal))
        runs: list[tuple[str, str, tuple[int, ...], Admission]] = [
            *((name, "equal", equal, "always") for name in make),
            *((name, "equal", equal, "worth") for name in ("belady", "lru", *ours)),
            *((name, "marginal", marginal, "always") for name in ours),
        ]
        best: dict[Admission, float] = {}
        for name, split, capacities, admission in runs:
            progress(f"{trace}: {name}, {share:.0%}, {split}, {admission}")
            rate = replay(make[name](), ids, weights, capacities, admission).hit_rate
            best.setdefault(admission, rate)
            yield {
                "trace": trace,
                "tokens": len(ids),
                "share": share,
                "policy": name,
                "capacities": split,
                "admission": admission,
                "hit_rate": rate,
                "of_belady": rate / best[admission],
            }


def planner_table(result: dict[str, Any]) -> str:
    """Return the record as text: one table for each of its parts."""
    lines = [f"{'deciding one layer':<52}{'experts':>8}{'tokens':>8}{'us':>9}"]
    for row in result["decisions"]:
        micros = row["seconds_median"] * 1e6
        lines.append(f"{row['case']:<52}{row['experts']:>8}{row['tokens']:>8}{micros:>9.1f}")
    for row in result["steps"]:
        name = f"{row['case']}, {row['ahead']} layers ahead"
        micros = row["seconds_median"] * 1e6
        lines.append(f"{name:<52}{row['experts']:>8}{1:>8}{micros:>9.1f}")
    lines += [
        "",
        f"{'distance of plans from their lower bound':<44}{'experts':>8}{'mean':>8}{'max':>8}"
        f"{'proven':>8}{'baseline':>9}",
    ]
    for row in result["gaps"]:
        lines.append(
            f"{'':<44}{row['experts']:>8}{row['gap_mean']:>8.2%}{row['gap_max']:>8.2%}"
            f"{row['proven_optimal']:>8.0%}{row['best_baseline_over_ours_mean']:>8.3f}x"
        )
    if result["caches"]:
        lines += [
            "",
            f"{'hit rate':<32}{'slots':>6} {'policy':<10}{'capacities':<12}{'admission':<10}"
            f"{'hits':>7}{'of Belady':>11}",
        ]
    for row in result["caches"]:
        lines.append(
            f"{row['trace']:<32}{row['share']:>6.0%} {row['policy']:<10}{row['capacities']:<12}"
            f"{row['admission']:<10}{row['hit_rate']:>7.1%}{row['of_belady']:>11.1%}"
        )
    return "\n".join(lines)
