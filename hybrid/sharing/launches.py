"""Cuts a layer's experts on a device into launches, each computed together.

A launch for every expert would cost the host more than the device takes, and one for all would
have the device wait for the last copy. So copies are computed in groups as they arrive, and
residents fill the time until the next group is there: then staging slots are free again by the
time the link needs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from planner.decide.director import Decision
from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import LayerCost
from planner.describe.estimate import LayerWork
from planner.foretell.memory import STAGING

GROUP = 4
"""Copies of a prompt's layer that a launch computes at most, and the device waits for."""


class Launch(NamedTuple):
    """Experts that a device computes together.

    Parameters
    ----------
    copies
        Experts whose copies are enqueued first; the launch waits for them if it computes them.
    experts
        What it computes; may be none.
    """

    copies: tuple[int, ...]
    experts: tuple[int, ...]


def launches_of(
    decision: Decision, cost: LayerCost, tokens: int, kept: Collection[int], free_staging: int
) -> list[Launch]:
    """Cut a decision's experts on the device into launches.

    A single token's are one where the CPU takes longer even so.

    Parameters
    ----------
    decision, cost, tokens, kept
        As of :func:`cut`.
    free_staging
        Slots for what is not kept, that hold nothing now.
    """
    plan = decision.plan
    if not plan.copies or (tokens == 1 and _can_wait(decision, cost, free_staging)):
        return [Launch(plan.copies, plan.gpu)]
    return cut(decision.work, plan, cost, tokens, kept, STAGING)


def _can_wait(decision: Decision, cost: LayerCost, free_staging: int) -> bool:
    """Whether the GPU may begin after the last copy and still be done before the CPU."""
    plan = decision.plan
    if len(plan.copies) - len(decision.admitted) > free_staging:
        return False
    begin_s = max(plan.link_end_s, decision.work.gpu_free_s + cost.gpu_start_s)
    return begin_s + len(plan.gpu) * cost.gpu_s(1) <= plan.cpu_end_s


def cut(
    work: LayerWork,
    plan: LayerPlan,
    cost: LayerCost,
    tokens: int,
    kept: Collection[int],
    staging: int,
) -> list[Launch]:
    """Cut a plan's experts on the device into launches, in the order of the plan's copies.

    Parameters
    ----------
    work, plan
        One layer's step.
    cost
        What the plan was made with.
    tokens
        Of the step: a single token's copies are computed one by one.
    kept
        Copied experts that have slots of their own; the others are staged.
    staging
        Slots for those. Half of them are left for what is copied meanwhile.
    """
    copied, loads = set(plan.copies), dict(work.loads)
    residents = deque([expert for expert in plan.gpu if expert not in copied])
    if not plan.copies:
        return [Launch((), tuple(residents))]
    free_s = work.gpu_free_s + cost.gpu_start_s

    def until(arrival_s: float) -> tuple[int, ...]:
        """Residents that the device begins before the next group is there."""
        nonlocal free_s
        begun = []
        while residents and free_s < arrival_s:
            free_s += cost.gpu_s(loads[residents[0]])
            begun.append(residents.popleft())
        return tuple(begun)

    groups = _groups(plan.copies, kept, GROUP if tokens > 1 else 1, max(1, staging // 2))
    arrivals_s, link_end_s = [], work.link_free_s
    for group in groups:
        link_end_s += len(group) * cost.copy_s()
        arrivals_s.append(link_end_s)
    launches = [Launch(groups[0], until(arrivals_s[0]))]
    for at, group in enumerate(groups):
        free_s = max(free_s, arrivals_s[at]) + sum([cost.gpu_s(loads[one]) for one in group])
        last = at + 1 == len(groups)
        filling = tuple(residents) if last else until(arrivals_s[at + 1])
        launches.append(Launch(group if at else (), group + filling))
    return launches


def _groups(
    copies: Sequence[int], kept: Collection[int], most: int, most_staged: int
) -> list[tuple[int, ...]]:
    """Cut copies into groups: the first and the last are small, so that nobody waits for long."""
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    staged = 0
    for at, expert in enumerate(copies):
        group.append(expert)
        staged += expert not in kept
        before, left = at + 1 - len(group), len(copies) - at - 1
        if len(group) > min(before // 2, left // 2, most - 1) or staged == most_staged:
            groups.append(tuple(group))
            group, staged = [], 0
    return groups
