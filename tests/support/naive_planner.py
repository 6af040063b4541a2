"""Plain twins of the planner's clever parts: slow, short, and obviously right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, combinations, permutations

import numpy as np

from planner.decide.problem import Problem


def makespan_s(problem: Problem, on_gpu: Iterable[int], copies: Sequence[int]) -> float:
    """Run the lanes by hand: residents in ``on_gpu`` first, then ``copies`` in their order."""
    chosen = set(on_gpu)
    cpu = [problem.cpu_s[i] for i in range(len(problem)) if i not in chosen]
    cpu_end = problem.cpu_start_s + sum(cpu) if cpu else 0.0
    gpu_end = problem.gpu_free_s + (problem.gpu_start_s if chosen else 0.0)
    gpu_end += sum(problem.gpu_s[i] for i in chosen if problem.resident[i])
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
    gpu_end = problem.gpu_free_s + on_gpu.any(axis=1) * problem.gpu_start_s
    gpu_end = gpu_end + (on_gpu & resident) @ gpu_s
    link_end = np.full(2**n, problem.link_free_s)
    quick = sorted((copy_s[i], i) for i in range(n) if not resident[i] and copy_s[i] < gpu_s[i])
    slow = sorted((-gpu_s[i], i) for i in range(n) if not resident[i] and copy_s[i] >= gpu_s[i])
    for _, i in quick + slow:
        link_end = link_end + on_gpu[:, i] * copy_s[i]
        computed = np.maximum(gpu_end, link_end) + gpu_s[i]
        gpu_end = np.where(on_gpu[:, i], computed, gpu_end)
    return float(np.maximum(cpu_end, gpu_end).min())


def lru_hits(requests: Sequence[int], capacity: int) -> int:
    """Textbook LRU: a list from the least to the most recently used."""
    held: list[int] = []
    hits = 0
    for expert in requests:
        if expert in held:
            hits += 1
            held.remove(expert)
        elif len(held) == capacity:
            held.pop(0)
        held.append(expert)
    return hits


def lfu_hits(requests: Sequence[int], capacity: int) -> int:
    """Textbook LFU that never forgets a count; ties by the last use."""
    held: set[int] = set()
    hits = 0
    for now, expert in enumerate(requests):
        if expert in held:
            hits += 1
            continue
        if len(held) == capacity:
            past = list(requests[: now + 1])
            last = {other: now - past[::-1].index(other) for other in held}
            held.remove(min(held, key=lambda other: (past.count(other), last[other])))
        held.add(expert)
    return hits


def arc_hits(requests: Sequence[int], c: int) -> int:
    """ARC as in Megiddo and Modha's Figure 4, lists from least to most recently used."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, hits = 0.0, 0

    def replace(x: int) -> None:
        if t1 and ((x in b2 and len(t1) == p) or len(t1) > p):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in requests:
        if x in t1 or x in t2:  # case I
            hits += 1
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:  # case II
            p = min(c, p + max(len(b2) / len(b1), 1))
            replace(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:  # case III
            p = max(0, p - max(len(b1) / len(b2), 1))
            replace(x)
            b2.remove(x)
            t2.append(x)
        else:  # case IV
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(x)
            t1.append(x)
    return hits


def most_hits(steps: Sequence[Sequence[int]], capacity: int, *, must_admit: bool) -> int:
    """Try every decision: the most hits of any cache that only takes experts when they are used.

    With ``must_admit`` a step's experts are all resident at its end, else anyone may go.
    """
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for step in steps:
        following: dict[frozenset[int], int] = {}
        for held, hits in reached.items():
            fixed = set(step) if must_admit else set()
            others = sorted((held | set(step)) - fixed)
            for size in range(min(len(others), capacity - len(fixed)) + 1):
                for kept in combinations(others, size):
                    state = frozenset(fixed.union(kept))
                    total = hits + len(held & set(step))
                    following[state] = max(following.get(state, 0), total)
        reached = following
    return max(reached.values())


def best_prefetch(worth: Sequence[Sequence[float]], room: Sequence[int]) -> float:
    """Try every number of items of every group under the cumulative limits ``room``."""
    best, counts = 0.0, [()]
    for group, values in enumerate(worth):
        counts = [
            (*before, n)
            for before in counts
            for n in range(len(values))
            if sum(before) + n <= room[group]
        ]
    for chosen in counts:
        best = max(best, sum(values[n] for values, n in zip(worth, chosen, strict=True)))
    return best
