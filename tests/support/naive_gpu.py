"""Plain twins of the device code: what slots hold, when lanes run, what experts compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import naive
from hybrid.formats.block import Block, ExpertWeights


@dataclass(frozen=True)
class Copy:
    """Block number ``block`` goes into ``slot``."""

    block: int
    slot: int


@dataclass(frozen=True)
class Compute:
    """One token goes to each of ``slots``."""

    slots: tuple[int, ...]


Step = Copy | Compute


def contents(program: Sequence[Step]) -> list[list[int]]:
    """The blocks that every compute must see: as if all ran in the order of the calls."""
    slots: dict[int, int] = {}
    seen = []
    for step in program:
        if isinstance(step, Copy):
            slots[step.slot] = step.block
        else:
            seen.append([slots[slot] for slot in step.slots])
    return seen


def timeline(
    program: Sequence[Step], copy_s: float, expert_s: Callable[[int], float], launch_s: float
) -> list[tuple[float, float]]:
    """Start and end of every step when all are called at time 0."""
    spans: list[tuple[float, float]] = []
    for at, step in enumerate(program):
        before = [(program[i], spans[i][1]) for i in range(at)]
        start = 0.0
        for earlier, end in before:
            same_lane = type(earlier) is type(step)
            if same_lane or (_slots(earlier) & _slots(step)):
                start = max(start, end)
        seconds = copy_s
        if isinstance(step, Compute):
            used = sorted(set(step.slots))
            seconds = sum(expert_s(step.slots.count(slot)) for slot in used)
            seconds += launch_s if used else 0.0
        spans.append((start, start + seconds))
    return spans


def _slots(step: Step) -> set[int]:
    return {step.slot} if isinstance(step, Copy) else set(step.slots)


def experts(
    shape: Block,
    weights: list[ExpertWeights],
    x: NDArray[np.float32],
    ids: NDArray[np.int32],
    routing_weights: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Every routed pair by itself in float64, activations not rounded to int8."""
    return naive.experts(
        replace(shape, format="f32", down_format=""), weights, x, ids, routing_weights
    )


def small_layout(stride: int = 4096) -> Block:
    """The layout of the smallest expert there is."""
    return Block(hidden=4, intermediate=4, format="q4_0", stride=stride)
