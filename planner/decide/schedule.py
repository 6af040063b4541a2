"""Where each activated expert of a layer runs, so that the layer ends as early as possible.

The problem. Expert i takes c_i seconds on the CPU, g_i on the GPU and, if it is not resident,
t_i on the link before the GPU can start it. The CPU has a start cost c0, the GPU can begin at g0
(when it is free, and a launch later), the link at p0. Choose the set S that the CPU computes and
the order of the copies to

    minimise  max( c0 [S not empty] + sum_{i in S} c_i,  end of the GPU lane ),

where the GPU computes every expert outside S, resident ones at any time, the others after their
copy, and the link copies one expert at a time (HybriMoE, arXiv 2504.05897, section IV-B).

How it is solved.

- Equal g and equal t (decode, and every prefill whose experts are bound by memory): exactly. Only
  the numbers matter, `a` residents and `k` copied experts on the GPU; the CPU takes the cheapest
  of each kind. As `k` grows, the `a` where the two lanes balance only falls, so one sweep over
  sorted prefix sums finds the best pair: O(n log n).
- Otherwise: a dynamic program over the experts in Johnson's order. Of more than ``SMALL``
  experts, the linear relaxation decides all but the ``CORE`` whose place it leaves most in doubt.

Either way the baselines are evaluated too and the least makespan wins, so a plan is never worse
than any of them under the same cost model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate

from planner.decide.baselines import BASELINES, all_cpu, on_demand
from planner.decide.bounds import relaxations
from planner.decide.dynamic import dynamic_program
from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import LayerCost, Problem
from planner.describe.estimate import LayerWork

SMALL = 16
"""Up to this many experts the dynamic program places all of them."""

CORE = 12
"""Of more experts, how many it places; the relaxation decides the others."""

SEARCH_S = 400e-6
"""What the search for a better plan takes, roughly: bounds and dynamic programs took 0.3 to 0.8 ms
on a 3 GHz Zen 3."""


def schedule(
    work: LayerWork, residency: Collection[int], cost: LayerCost, search_s: float = 0.0
) -> LayerPlan:
    """Plan one layer's step.

    Parameters
    ----------
    work
        The activated experts, their loads, and when the GPU and the link are free.
    residency
        Ids of the experts in this layer's GPU slots; others than the activated ones are ignored.
    cost
        Durations by load.
    search_s
        What a search takes of the step's time: a plan that could end no more than this earlier is
        not looked for. ``SEARCH_S`` for whoever waits for the plan.

    Returns
    -------
    LayerPlan
        Never worse than any of ``baselines.BASELINES``; the same input gives the same
        plan, byte for byte.

    Raises
    ------
    CostError
        When the cost model returns a negative or non-finite duration.
    """
    return solve(Problem.of(work, residency, cost), search_s)


def solve(problem: Problem, search_s: float = 0.0) -> LayerPlan:
    """Plan a priced problem; see ``schedule``."""
    baselines = {baseline.name: baseline.solve(problem) for baseline in BASELINES}
    if _is_uniform(problem):
        best = least(exact_rule(problem), *baselines.values())
        return best._replace(lower_bound_s=best.makespan_s)
    best = least(*baselines.values())
    if best.makespan_s <= best.lower_bound_s + search_s:
        return best
    relaxed = sorted(relaxations(problem), key=lambda relaxed: relaxed.bound_s)
    # Plans that leave one side idle, and do not pay its start, are baselines.
    idle_s = [baselines[idle.name].makespan_s for idle in (all_cpu, on_demand)]
    bound_s = min(*idle_s, relaxed[0].bound_s)
    if len(problem) <= SMALL and bound_s + search_s < best.makespan_s:
        found, exhaustive = dynamic_program(problem, range(len(problem)), (), best.makespan_s)
        best = least(best, found or best)
        if exhaustive:
            return best._replace(lower_bound_s=best.makespan_s)
    elif len(problem) > SMALL:
        for one in relaxed:
            if one.bound_s + search_s < best.makespan_s:
                core, on_gpu = one.core(CORE)
                found, _ = dynamic_program(problem, core, on_gpu, best.makespan_s)
                best = least(best, found or best)
    return best._replace(lower_bound_s=min(bound_s, best.makespan_s))


def least(*plans: LayerPlan) -> LayerPlan:
    """Return the plan that ends first; among equals the first given."""
    return min(plans, key=lambda plan: plan.makespan_s)


def _is_uniform(problem: Problem) -> bool:
    missing = problem.missing
    return len(set(problem.gpu_s)) <= 1 and len({problem.copy_s[i] for i in missing}) <= 1


def exact_rule(problem: Problem) -> LayerPlan:
    """Return an optimal plan when all experts have the same GPU time and the same copy time."""
    residents, missing = (
        sorted(positions, key=lambda i: (problem.cpu_s[i], i))
        for positions in (problem.residents, problem.missing)
    )
    on_gpu, copied = best_split(
        [problem.cpu_s[i] for i in residents],
        [problem.cpu_s[i] for i in missing],
        gpu_s=problem.gpu_s[0] if len(problem) else 0.0,
        copy_s=problem.copy_s[missing[0]] if missing else 0.0,
        cpu_start_s=problem.cpu_start_s,
        gpu_begin_s=problem.gpu_begin_s,
        link_free_s=problem.link_free_s,
    )
    chosen = residents[len(residents) - on_gpu :] + missing[len(missing) - copied :]
    return problem.place(chosen, "exact")


def best_split(
    resident_cpu_s: Sequence[float],
    missing_cpu_s: Sequence[float],
    *,
    gpu_s: float,
    copy_s: float,
    cpu_start_s: float,
    gpu_begin_s: float,
    link_free_s: float,
) -> tuple[int, int]:
    """Return how many resident and how many missing experts the GPU should compute.

    Parameters
    ----------
    resident_cpu_s, missing_cpu_s
        CPU times, each ascending; the CPU takes the first of each.
    gpu_s, copy_s
        The time of every expert on the GPU and on the link.
    cpu_start_s, gpu_begin_s, link_free_s
        As in ``Problem``.

    Returns
    -------
    tuple of int
        ``(a, k)`` with the least makespan; among equals the fewest copies, then the fewest
        residents, which leaves the GPU free the earliest.
    """
    residents, missing = len(resident_cpu_s), len(missing_cpu_s)
    resident_prefix_s = list(accumulate(resident_cpu_s, initial=cpu_start_s))
    missing_prefix_s = list(accumulate(missing_cpu_s, initial=0.0))
    best = (math.inf, 0, 0)
    a = residents
    for k in range(missing + 1):
        on_cpu_s = missing_prefix_s[missing - k]
        # With copies, either the GPU or the link never waits once they begin.
        path_s = link_free_s + max(copy_s + k * gpu_s, k * copy_s + gpu_s) if k else 0.0
        # Go to the least a at which the GPU is the later lane; it only falls as k grows.
        while a and (
            max(gpu_begin_s + (a - 1 + k) * gpu_s, path_s)
            >= resident_prefix_s[residents - a + 1] + on_cpu_s
        ):
            a -= 1
        cpu_s = resident_prefix_s[residents - a] + on_cpu_s if a + k < residents + missing else 0.0
        best = min(best, (max(gpu_begin_s + (a + k) * gpu_s, path_s, cpu_s), k, a))
        if a:  # one resident fewer on the GPU makes the CPU the later lane
            best = min(best, (resident_prefix_s[residents - a + 1] + on_cpu_s, k, a - 1))
    return best[2], best[1]
