"""Reads the clocks of a model on the CPU alone: of experts in a prompt, of kernels in tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.fast.decode import FastDecoder
from hybrid.model import Model
from hybrid.stopwatch import Stopwatch
from planner.cost.step_times import StepTimes
from planner.describe.terms import CPU, DENSE, HEAD, MIXER


def begin_run(loaded: Model, prompt_tokens: int) -> None:
    """Set a model's clocks to zero; a prompt of so many tokens comes next."""
    for experts in loaded.layers:
        experts.begin_run(prompt_tokens)
    if loaded.fast.decoder is not None:
        loaded.fast.decoder.begin_run()


def prompt_loads(loaded: Model) -> list[list[int]]:
    """Return the tokens that each expert got of the prompt since :func:`begin_run`.

    One row a MoE layer, in order, of one piece of the prompt after the other: as
    :func:`hybrid.ledger.prediction.predict` takes them. None of a prompt that was one step.
    """
    layers = [experts.loads for experts in loaded.layers]
    return [loads for piece in zip(*layers, strict=True) for loads in piece]


def prompt_experts_s(loaded: Model) -> float:
    """Return the seconds that experts' modules took in the prompt since :func:`begin_run`."""
    return float(sum(experts.watch.seconds for experts in loaded.layers))


def token_times(fast: FastDecoder) -> StepTimes | None:
    """Return what a single token took on average since the run began, as the kernels' clock says.

    Without what surrounds the layers, which kernels do not see. None where the processor has no
    clock that kernels can read.
    """
    return _times(fast.decoder.spent_s(), fast.watch)


def step_times(fast: FastDecoder) -> StepTimes | None:
    """Return the same of a step of several tokens."""
    return _times(fast.decoder.spent_s(many=True), fast.step_watch)


def _times(spent_s: NDArray[np.float64] | None, watch: Stopwatch) -> StepTimes | None:
    if spent_s is None:
        return None
    *rows, head = (spent_s / watch.pieces).tolist()
    layers = tuple(dict(zip((MIXER, CPU, DENSE), row, strict=True)) for row in rows)
    return StepTimes(layers, {HEAD: head[0]})
