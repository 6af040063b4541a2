"""One layer's placement problem in numbers, and what a given placement of it costs.

For a fixed set of experts on the GPU, copying and computing them is a flow shop of two machines
(the link, then the GPU). Johnson's rule orders the copies best: those that copy faster than they
compute first, quickest copy first; then the others, longest computation first. Resident experts
need no copy, so they run before any copied one and never delay it needlessly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from planner.decide.layer_plan import LayerPlan
from planner.describe.estimate import LayerWork
from planner.errors import CostError


class LayerCost(Protocol):
    """What scheduling needs to know of a cost model; all durations in seconds."""

    @property
    def cpu_start_s(self) -> float:
        """Fixed cost of using the CPU in a layer at all."""

    @property
    def gpu_start_s(self) -> float:
        """Fixed cost of using the GPU in a layer at all: the launch of its first call."""

    def cpu_s(self, load: int) -> float:
        """Time one expert adds to the CPU lane at this load."""

    def gpu_s(self, load: int) -> float:
        """Time one resident expert adds to the GPU lane at this load."""

    def copy_s(self) -> float:
        """Time to copy one expert over the link."""


@dataclass(frozen=True)
class Problem:
    """The activated experts of one layer as parallel tuples, in ascending order of id.

    Parameters
    ----------
    layer
        Index among the model's MoE layers.
    experts, loads
        Ids, and the tokens sent to each.
    cpu_s, gpu_s, copy_s
        Duration of each expert on each lane; ``copy_s`` of a resident expert is never looked at.
    resident
        Whether the expert is in a GPU slot already.
    cpu_start_s, gpu_start_s
        Added once when that side computes anything.
    gpu_free_s, link_free_s
        When those lanes are free.
    """

    layer: int
    experts: tuple[int, ...]
    loads: tuple[int, ...]
    cpu_s: tuple[float, ...]
    gpu_s: tuple[float, ...]
    copy_s: tuple[float, ...]
    resident: tuple[bool, ...]
    cpu_start_s: float = 0.0
    gpu_start_s: float = 0.0
    gpu_free_s: float = 0.0
    link_free_s: float = 0.0

    @classmethod
    def of(cls, work: LayerWork, residency: Collection[int], cost: LayerCost) -> Problem:
        """Price ``work`` with ``cost``.

        Raises
        ------
        CostError
            When the cost model returns a negative or non-finite duration.
        """
        held = residency if isinstance(residency, set | frozenset) else frozenset(residency)
        # Loads repeat: each distinct one is priced once.
        experts, loads = zip(*work.loads, strict=True) if work.loads else ((), ())
        prices = {load: (cost.cpu_s(load), cost.gpu_s(load)) for load in set(loads)}
        once = copy_s, cpu_start_s, gpu_start_s = cost.copy_s(), cost.cpu_start_s, cost.gpu_start_s
        for price in (*once, *(value for pair in prices.values() for value in pair)):
            if not 0 <= price < math.inf:
                raise CostError(
                    f"layer {work.layer}: the cost model gave a duration of {price!r} s",
                    hint="durations are finite and at least 0",
                )
        return cls(
            layer=work.layer,
            experts=experts,
            loads=loads,
            cpu_s=tuple([prices[load][0] for load in loads]),
            gpu_s=tuple([prices[load][1] for load in loads]),
            copy_s=(copy_s,) * len(loads),
            resident=tuple([expert in held for expert in experts]),
            cpu_start_s=cpu_start_s,
            gpu_start_s=gpu_start_s,
            gpu_free_s=work.gpu_free_s,
            link_free_s=work.link_free_s,
        )

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def gpu_begin_s(self) -> float:
        """When the GPU begins with its first expert, if there is one and it is resident."""
        return self.gpu_free_s + self.gpu_start_s

    @property
    def residents(self) -> list[int]:
        """Positions (not ids) of the resident experts."""
        return [i for i, resident in enumerate(self.resident) if resident]

    @property
    def missing(self) -> list[int]:
        """Positions (not ids) of the experts that would have to be copied."""
        return [i for i, resident in enumerate(self.resident) if not resident]

    def johnson(self, positions: Iterable[int]) -> list[int]:
        """Order the copies at ``positions`` by Johnson's rule; ties by id."""
        return sorted(positions, key=self._johnson_rank.__getitem__)

    @cached_property
    def _johnson_rank(self) -> list[int]:
        """The place of each position when all of them are copied."""
        keys = [
            (0, copy_s) if copy_s < gpu_s else (1, -gpu_s)
            for copy_s, gpu_s in zip(self.copy_s, self.gpu_s, strict=True)
        ]
        rank = [0] * len(keys)
        for place, i in enumerate(sorted(range(len(keys)), key=keys.__getitem__)):
            rank[i] = place
        return rank

    def place(self, on_gpu: Iterable[int], method: str) -> LayerPlan:
        """Return the best plan that runs the positions ``on_gpu`` on the GPU, the rest not."""
        chosen = set(on_gpu)
        copies = self.johnson(i for i in chosen if not self.resident[i])
        gpu = [i for i in self.residents if i in chosen] + copies
        return self.plan(gpu, copies, method)

    def plan(self, gpu: Sequence[int], copies: Sequence[int], method: str) -> LayerPlan:
        """Run the three lanes: copies and GPU experts in the given orders of positions.

        Experts in neither order run on the CPU. The lower bound is left at the makespan of the
        trivial case: the time the GPU is free.
        """
        arrival_s: dict[int, float] = {}
        link_end_s = self.link_free_s
        for i in copies:
            link_end_s += self.copy_s[i]
            arrival_s[i] = link_end_s
        gpu_end_s = self.gpu_begin_s if gpu else self.gpu_free_s
        for i in gpu:
            gpu_end_s = max(gpu_end_s, arrival_s.get(i, 0.0)) + self.gpu_s[i]
        on_gpu = set(gpu)
        cpu = [i for i in range(len(self)) if i not in on_gpu]
        cpu_end_s = self.cpu_start_s if cpu else 0.0
        for i in cpu:
            cpu_end_s += self.cpu_s[i]
        experts = self.experts
        return LayerPlan(
            layer=self.layer,
            cpu=tuple([experts[i] for i in cpu]),
            gpu=tuple([experts[i] for i in gpu]),
            copies=tuple([experts[i] for i in copies]),
            cpu_end_s=cpu_end_s,
            gpu_end_s=gpu_end_s,
            link_end_s=link_end_s,
            lower_bound_s=self.gpu_free_s,
            method=method,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """One expert on one lane (``cpu``, ``gpu`` or ``link``), in seconds from the step's start."""

    lane: str
    expert: int
    start_s: float
    end_s: float


def timeline(problem: Problem, plan: LayerPlan) -> list[Span]:
    """Return what ``plan`` does when, lane by lane; the ends agree with the plan's to the bit.

    What a side costs once is time before its first span, the time until a lane is free likewise.
    """
    at = {expert: i for i, expert in enumerate(problem.experts)}
    spans: list[Span] = []
    arrival_s: dict[int, float] = {}

    def add(lane: str, expert: int, start_s: float, duration_s: float) -> float:
        spans.append(Span(lane, expert, start_s, start_s + duration_s))
        return start_s + duration_s

    now_s = problem.cpu_start_s
    for expert in plan.cpu:
        now_s = add("cpu", expert, now_s, problem.cpu_s[at[expert]])
    now_s = problem.link_free_s
    for expert in plan.copies:
        now_s = arrival_s[expert] = add("link", expert, now_s, problem.copy_s[at[expert]])
    now_s = problem.gpu_begin_s
    for expert in plan.gpu:
        start_s = max(now_s, arrival_s.get(expert, 0.0))
        now_s = add("gpu", expert, start_s, problem.gpu_s[at[expert]])
    return spans
