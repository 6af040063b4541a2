"""The dynamic program behind ``planner.decide.schedule`` for experts whose times differ."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import Problem

Array = NDArray[np.float64]

WIDTH = 4096
"""States kept after each expert: none are merged before the twelfth."""

NO_COPIES = (0.0, 0.0, -math.inf)
"""Time on the link, on the GPU, and across both, of copying and computing no experts."""


def dynamic_program(
    problem: Problem, free: Collection[int], on_gpu: Collection[int], limit_s: float
) -> tuple[LayerPlan | None, bool]:
    """Place the positions ``free``, given that ``on_gpu`` run on the GPU and the rest on the CPU.

    A state is (end of the CPU, of the link, of the GPU) after some experts in Johnson's order.
    Each free expert doubles the states; those that can no longer end before ``limit_s`` are
    dropped. Of more than ``WIDTH`` states, those whose CPU and link end in the same tick are
    merged into the one whose GPU ends first; a tick is ``limit_s`` over the square root of the
    width, and states keep their exact times, so errors do not add up to more than a tick an
    expert.

    Returns
    -------
    tuple
        The best plan found, or None when none ends before ``limit_s``; and whether no states
        were merged, so that there is no better one.
    """
    undecided, decided = frozenset(free), frozenset(on_gpu)
    cpu_s, gpu_s, copy_s = problem.cpu_s, problem.gpu_s, problem.copy_s
    resident = problem.resident
    cpu_start_s, gpu_start_s = problem.cpu_start_s, problem.gpu_begin_s
    for i in range(len(problem)):
        if i in decided:
            gpu_start_s += gpu_s[i] if resident[i] else 0.0
        elif i not in undecided:
            cpu_start_s += cpu_s[i]
    order = sorted(i for i in undecided if resident[i])
    order += problem.johnson(i for i in undecided | decided if not resident[i])

    cpu, link, gpu = (np.array([s]) for s in (cpu_start_s, problem.link_free_s, gpu_start_s))
    chosen = np.zeros(1, dtype=np.int64)  # bit b: the b-th undecided expert runs on the GPU
    placed: list[int] = []
    exhaustive = True
    # The decided copies since the last undecided one, as one step of the flow shop: its time on
    # the link, on the GPU, and from the link's start to the GPU's end when the GPU keeps waiting.
    run_link_s, run_gpu_s, run_path_s = NO_COPIES
    for i in order:
        if i in decided:
            run_link_s += copy_s[i]
            run_gpu_s += gpu_s[i]
            run_path_s = max(run_path_s, run_link_s) + gpu_s[i]
            continue
        if run_path_s >= 0:
            gpu = np.maximum(gpu + run_gpu_s, link + run_path_s)
            link = link + run_link_s
            run_link_s, run_gpu_s, run_path_s = NO_COPIES
        copied = link if resident[i] else link + copy_s[i]
        computed = (gpu if resident[i] else np.maximum(gpu, copied)) + gpu_s[i]
        left, right = cpu + cpu_s[i] < limit_s, computed < limit_s
        cpu = np.concatenate((cpu[left] + cpu_s[i], cpu[right]))
        link = np.concatenate((link[left], copied[right]))
        gpu = np.concatenate((gpu[left], computed[right]))
        chosen = np.concatenate((chosen[left], chosen[right] | (1 << len(placed))))
        placed.append(i)
        if len(cpu) > WIDTH:
            exhaustive = False
            kept = _representatives(cpu, link, gpu, limit_s)
            cpu, link, gpu, chosen = cpu[kept], link[kept], gpu[kept], chosen[kept]
    end_s = np.maximum(cpu, np.maximum(gpu + run_gpu_s, link + run_path_s))
    if not len(end_s) or not end_s.min() < limit_s:
        return None, exhaustive
    bits = int(chosen[end_s.argmin()])
    on_gpu = decided | {i for b, i in enumerate(placed) if bits >> b & 1}
    return problem.place(on_gpu, "dynamic_program"), exhaustive


def _representatives(cpu: Array, link: Array, gpu: Array, limit_s: float) -> NDArray[np.intp]:
    """Return, in ascending order, the state of each cell of ticks whose GPU ends first."""
    side = math.isqrt(WIDTH)
    tick_s = limit_s / side
    # No CPU ends after the limit; a link that does only carries copies nobody waits for.
    column = np.minimum(link / tick_s, side).astype(np.intp)
    cell = (cpu / tick_s).astype(np.intp) * (side + 1) + column
    winner = np.full((side + 1) ** 2, -1, dtype=np.intp)
    latest_first = np.argsort(-gpu, kind="stable")
    winner[cell[latest_first]] = latest_first  # the last one written stays
    return np.sort(winner[winner >= 0])
