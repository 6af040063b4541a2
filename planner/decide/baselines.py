"""What other systems do with one layer's experts: the plans ours must never be worse than."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import LayerCost, Problem
from planner.describe.estimate import LayerWork


@dataclass(frozen=True, slots=True)
class Baseline:
    """A named rule; call it like ``schedule``, or give ``solve`` a priced problem."""

    name: str
    solve: Callable[[Problem], LayerPlan]

    def __call__(self, work: LayerWork, residency: Collection[int], cost: LayerCost) -> LayerPlan:
        """Plan ``work`` by this rule alone."""
        return self.solve(Problem.of(work, residency, cost))


def _all_cpu(problem: Problem) -> LayerPlan:
    return problem.place((), "all_cpu")


def _on_demand(problem: Problem) -> LayerPlan:
    return problem.place(range(len(problem)), "on_demand")


def _static_split(problem: Problem) -> LayerPlan:
    return problem.place(problem.residents, "static_split")


def _hybrimoe_greedy(problem: Problem) -> LayerPlan:
    """Commit, again and again, the one candidate that completes first (arXiv 2504.05897, IV-B).

    GPU: the heaviest expert that is there, else the next to arrive. CPU: the lightest expert that
    is neither resident nor copied; when none is left, the lightest resident one. Link: the
    heaviest expert that is neither. Ties go to the link, then to the CPU.
    """
    loads = problem.loads
    resident = deque(sorted(problem.residents, key=lambda i: (-loads[i], i)))
    missing = deque(sorted(problem.missing, key=lambda i: (loads[i], i)))
    in_flight: deque[tuple[float, int]] = deque()  # (arrival, position), the first to arrive first
    arrived: list[tuple[int, int]] = []  # heap of (-load, position)
    gpu: list[int] = []
    copies: list[int] = []
    cpu_s, gpu_s, link_s = problem.cpu_start_s, problem.gpu_begin_s, problem.link_free_s
    while resident or missing or in_flight or arrived:
        while in_flight and in_flight[0][0] <= gpu_s:
            position = in_flight.popleft()[1]
            heapq.heappush(arrived, (-loads[position], position))
        from_resident = bool(resident) and (not arrived or -loads[resident[0]] <= arrived[0][0])
        gpu_done_s = cpu_done_s = link_done_s = math.inf
        if from_resident:
            gpu_done_s = gpu_s + problem.gpu_s[resident[0]]
        elif arrived:
            gpu_done_s = gpu_s + problem.gpu_s[arrived[0][1]]
        elif in_flight:
            gpu_done_s = in_flight[0][0] + problem.gpu_s[in_flight[0][1]]
        if missing:
            cpu_done_s = cpu_s + problem.cpu_s[missing[0]]
            link_done_s = link_s + problem.copy_s[missing[-1]]
        elif resident:
            cpu_done_s = cpu_s + problem.cpu_s[resident[-1]]

        if missing and link_done_s <= min(cpu_done_s, gpu_done_s):
            link_s = link_done_s
            position = missing.pop()
            copies.append(position)
            in_flight.append((link_s, position))
        elif cpu_done_s <= gpu_done_s and (missing or resident):
            cpu_s = cpu_done_s
            if missing:
                missing.popleft()
            else:
                resident.pop()
        else:
            gpu_s = gpu_done_s
            if from_resident:
                gpu.append(resident.popleft())
            elif arrived:
                gpu.append(heapq.heappop(arrived)[1])
            else:
                gpu.append(in_flight.popleft()[1])
    return problem.plan(gpu, copies, "hybrimoe_greedy")


all_cpu = Baseline("all_cpu", _all_cpu)
"""Everything on the CPU, resident or not."""

on_demand = Baseline("on_demand", _on_demand)
"""Everything on the GPU: each missing expert is copied, in the best order."""

static_split = Baseline("static_split", _static_split)
"""Resident experts on the GPU, the others on the CPU: llama.cpp's and KTransformers' way."""

hybrimoe_greedy = Baseline("hybrimoe_greedy", _hybrimoe_greedy)
"""HybriMoE's rule of thumb."""

BASELINES = (all_cpu, on_demand, static_split, hybrimoe_greedy)
