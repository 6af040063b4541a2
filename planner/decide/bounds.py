"""A lower bound on any plan's makespan, and the prices that say which experts are hard to place.

Relax the problem of ``schedule.py`` by letting an expert be split between the lanes. With x_i
the part of expert i on the CPU, minimise M subject to three rows,

    c0 + sum_i c_i x_i                            <= M    (CPU)
    g0 + sum_i g_i (1 - x_i)                      <= M    (GPU)
    p0 + sum_{i missing} t_i (1 - x_i) + min_i g_i <= M    (link; the last copy is still computed)

For fixed rho, replacing the last two rows by their mean with weights 1 - rho and rho leaves a
fractional knapsack, solved by sorting. Every rho in [0, 1] gives a valid bound; the best one is
where the GPU and the link end together, found by regula falsi. Plans that copy nothing have no link
row: they are solved apart. Plans that leave the CPU or the GPU idle are one each, without that
side's start: they are not looked at here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.decide.problem import Problem

Array = NDArray[np.float64]

TINY = 1e-300
"""Keeps a ratio of durations finite where the lower one is 0."""

STEPS = 6
"""Values of rho to try between 0 and 1; each is a valid bound, so fewer only makes it looser."""

TOLERANCE = 1e-3
"""Of the bound: where GPU and link end this close together, rho is good enough."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One solved relaxation.

    Parameters
    ----------
    bound_s
        No plan of the relaxed kind has a smaller makespan.
    free
        Positions the relaxation could place, ``[n]``; all others are on the CPU.
    preference_s
        Price of each free expert on the CPU minus its price on the GPU, ``[n]``: negative means
        the CPU, and close to zero means that the choice hangs on the rounding.
    """

    bound_s: float
    free: NDArray[np.intp]
    preference_s: Array

    def core(self, size: int) -> tuple[list[int], list[int]]:
        """Return the ``size`` positions most in doubt, and which of the others the GPU gets."""
        doubt = np.argsort(np.abs(self.preference_s), kind="stable")
        clear = doubt[size:]
        on_gpu = clear[self.preference_s[clear] > 0]
        return self.free[doubt[:size]].tolist(), self.free[on_gpu].tolist()


def relaxations(problem: Problem) -> list[Relaxation]:
    """Return the relaxation of plans that copy nothing and, if any can, of plans that copy."""
    cpu_s, gpu_s = np.array(problem.cpu_s), np.array(problem.gpu_s)
    resident = np.array(problem.resident, dtype=bool)
    missing = ~resident
    held = np.flatnonzero(resident)
    forced_s = problem.cpu_start_s + float(cpu_s[missing].sum())
    bound_s, share = _split(cpu_s[held], gpu_s[held], forced_s, problem.gpu_begin_s)[:2]
    found = [Relaxation(bound_s, held, share * cpu_s[held] - (1 - share) * gpu_s[held])]
    if missing.any():
        found.append(_with_copies(problem, cpu_s, gpu_s, missing))
    return found


def _with_copies(
    problem: Problem, cpu_s: Array, gpu_s: Array, missing: NDArray[np.bool_]
) -> Relaxation:
    link_s = np.where(missing, np.array(problem.copy_s), 0.0)
    gpu_start_s = problem.gpu_begin_s
    link_start_s = problem.link_free_s + float(gpu_s[missing].min())
    everyone = np.arange(len(problem))
    best = Relaxation(-1.0, everyone, cpu_s)

    def link_lead(rho: float) -> float:
        """Solve at ``rho``, keep the bound if best; by how much the link outlasts the GPU."""
        nonlocal best
        lane_s = (1 - rho) * gpu_s + rho * link_s
        start_s = (1 - rho) * gpu_start_s + rho * link_start_s
        bound_s, share, moved = _split(cpu_s, lane_s, problem.cpu_start_s, start_s)
        if bound_s > best.bound_s:
            best = Relaxation(bound_s, everyone, share * cpu_s - (1 - share) * lane_s)
        lead_s = link_start_s - gpu_start_s + float((link_s - gpu_s) @ moved)
        return lead_s / bound_s if bound_s else 0.0

    low, high = 0.0, 1.0
    low_lead, high_lead = link_lead(low), 0.0
    if low_lead > 0:  # else the link never binds
        high_lead = link_lead(high)
    if high_lead < 0:  # else the GPU never does
        for _ in range(STEPS):
            rho = low + (high - low) * low_lead / (low_lead - high_lead)
            lead = link_lead(rho)
            if abs(lead) <= TOLERANCE:
                break
            # Regula falsi; halving the lead of an end that stays keeps it from stalling.
            if lead > 0:
                low, low_lead, high_lead = rho, lead, high_lead / 2
            else:
                high, high_lead, low_lead = rho, lead, low_lead / 2
    return best


def _split(
    cpu_s: Array, lane_s: Array, cpu_start_s: float, lane_start_s: float
) -> tuple[float, float, Array]:
    """Balance two lanes when experts may be split.

    Returns
    -------
    tuple
        The least makespan; the dual price of the CPU's row (the lane's is one minus it); and the
        part of each expert that is on the lane, ``[n]``.
    """
    on_lane = np.ones(len(cpu_s))
    order = np.argsort(cpu_s / (lane_s + TINY), kind="stable")
    # What each lane holds once the CPU has taken the first j experts of the order, j = 0..n.
    taken_s = np.cumsum(cpu_s[order])
    left_s = np.cumsum(lane_s[order][::-1])[::-1]
    over = taken_s + cpu_start_s >= lane_start_s + left_s - lane_s[order]
    total_s = lane_start_s + (float(left_s[0]) if len(order) else 0.0)
    if cpu_start_s >= total_s:
        return cpu_start_s, 1.0, on_lane
    if not over.any():
        return lane_start_s, 0.0, np.zeros(len(cpu_s))
    j = int(np.argmax(over))
    i = order[j]
    cpu_before_s = cpu_start_s + (float(taken_s[j - 1]) if j else 0.0)
    lane_before_s = lane_start_s + float(left_s[j])
    both_s = float(cpu_s[i] + lane_s[i]) or 1.0  # both 0 only where rounding moved the crossing
    part = min(1.0, (lane_before_s - cpu_before_s) / both_s)
    on_lane[order[:j]] = 0.0
    on_lane[i] = 1.0 - part
    return cpu_before_s + part * float(cpu_s[i]), float(lane_s[i]) / both_s, on_lane
