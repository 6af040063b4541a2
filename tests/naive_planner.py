"""Plain twins of the planner's clever parts: slow, short, and obviously right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, combinations, permutations

import numpy as np

from planner.problem import Problem


def makespan_s(problem: Problem, on_gpu: Iterable[int], copies: Sequence[int]) -> float:
    """Run the lanes by hand: residents in ``on_gpu`` first, then ``copies`` in their order."""
    chosen = set(on_gpu)
    cpu = [problem.cpu_s[i] for i in range(len(problem)) if i not in chosen]
    cpu_end = problem.cpu_start_s + sum(cpu) if cpu else 0.0
    gpu_end = problem.gpu_free_s + sum(problem.gpu_s[i] for i in chosen if problem.resident[i])
    link_end = problem.link_free_s
    for i in copies:
        link_end += problem.copy_s[i]
        gpu_end = max(gpu_end, link_end) + problem.gpu_s[i]
    return max(cpu_end, gpu_end)


def best_over_all_orders_s(problem: Problem) -> float:
    """Try every set and every order of its copies."""
    everyone = range(len(problem))
    sets = chain.from_iterable(combinations(everyone, size) for size in range(len(problem) + 1))
    return min(
        makespan_s(problem, on_gpu, copies)
        for on_gpu in sets
        for copies in permutations(i for i in on_gpu if not problem.resident[i])
    )


def best_over_all_sets_s(problem: Problem) -> float:
    """Try every set at once, ``[2^n]``, its copies in Johnson's order."""
    n = len(problem)
    on_gpu = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    resident, cpu_s = np.array(problem.resident, dtype=bool), np.array(problem.cpu_s)
    gpu_s, copy_s = np.array(problem.gpu_s), np.array(problem.copy_s)
    cpu_end = (~on_gpu) @ cpu_s + problem.cpu_start_s
    cpu_end[-1] = 0.0
    gpu_end = problem.gpu_free_s + (on_gpu & resident) @ gpu_s
    link_end = np.full(2**n, problem.link_free_s)
    quick = sorted((copy_s[i], i) for i in range(n) if not resident[i] and copy_s[i] < gpu_s[i])
    slow = sorted((-gpu_s[i], i) for i in range(n) if not resident[i] and copy_s[i] >= gpu_s[i])
    for _, i in quick + slow:
        link_end = link_end + on_gpu[:, i] * copy_s[i]
        computed = np.maximum(gpu_end, link_end) + gpu_s[i]
        gpu_end = np.where(on_gpu[:, i], computed, gpu_end)
    return float(np.maximum(cpu_end, gpu_end).min())
