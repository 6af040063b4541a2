"""Assembles a forward pass's time from what its parts take, layer by layer and term by term.

There is one way from the cost model to a step's time, and it is here: a plan's simulation, the
report of a session, benchmarks and the prediction for the CPU alone all take it, so that they say
the same of the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from planner.cost.cost import CostModel
from planner.describe.estimate import Estimate, LayerWork
from planner.describe.terms import (
    CPU,
    DECIDING,
    DENSE,
    DISK,
    EXPERTS,
    GPU,
    HEAD,
    JOINING,
    LINK,
    MIXER,
    TEXT,
    WITHIN_EXPERTS,
)

Terms = Mapping[str, float]
"""Seconds by term."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a forward pass, predicted or measured, by layer and term.

    Attributes
    ----------
    layers
        Of every layer.
    around
        Of what is no layer's: the output head and what surrounds the layers.
    """

    layers: tuple[Terms, ...]
    around: Terms

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by term, over all layers."""
        return total((*self.layers, self.around))

    @property
    def duration_s(self) -> float:
        """Seconds of the whole."""
        return sum(self.terms.values())

    def as_timed(self, moe: Sequence[bool]) -> StepTimes:
        """Return the same as a host that shares experts with a device can time it.

        Layers are those with experts; what lies between two of them counts for the later one's
        attention and router, what follows the last one for the output head, and all from deciding
        to the experts' sum is one term.

        Parameters
        ----------
        moe
            Whether each layer has experts.
        """
        layers: list[Terms] = []
        waiting_s = 0.0
        for terms, has_experts in zip(self.layers, moe, strict=True):
            if has_experts:
                experts_s = sum(terms.get(name, 0.0) for name in WITHIN_EXPERTS)
                mixer_s, deciding_s = waiting_s + terms[MIXER], terms.get(DECIDING, 0.0)
                layers.append({MIXER: mixer_s, DECIDING: deciding_s, EXPERTS: experts_s})
                waiting_s = 0.0
            else:
                waiting_s += sum(terms.values())
        return StepTimes(tuple(layers), {**self.around, HEAD: self.around[HEAD] + waiting_s})


def total(parts: Iterable[Terms]) -> dict[str, float]:
    """Sum parts term by term."""
    found: dict[str, float] = {}
    for terms in parts:
        for name, seconds in terms.items():
            found[name] = found.get(name, 0.0) + seconds
    return found


class DenseTimes(NamedTuple):
    """Predicted seconds of a forward pass without its routed experts.

    ``layers`` holds attention and router, and shared or dense feed-forward, of every decoder layer.
    """

    layers: list[tuple[float, float]]
    head_s: float


def dense_times(cost: CostModel, tokens: int, context: int, sequences: int = 1) -> DenseTimes:
    """Predict the dense parts of a step.

    Parameters
    ----------
    cost
        Model and machine.
    tokens
        Tokens of the step, over all sequences.
    context
        Tokens in the cache of each sequence after it.
    sequences
        How many sequences the tokens belong to.
    """
    kinds, kind_of = cost.kinds
    seconds = [
        (cost.mixer(kind, tokens, context, sequences).value, cost.ffn(kind, tokens).value)
        for kind in kinds
    ]
    head_s = cost.head(sequences, tokens).value
    return DenseTimes([seconds[kind] for kind in kind_of], head_s)


class Plan(Protocol):
    """Where a layer's experts run: :class:`planner.decide.layer_plan.LayerPlan`."""

    @property
    def cpu(self) -> tuple[int, ...]:
        """Experts that the CPU computes."""

    @property
    def gpu(self) -> tuple[int, ...]:
        """Experts that the GPU computes."""

    @property
    def copies(self) -> tuple[int, ...]:
        """Those of them that the link brings."""

    @property
    def cpu_end_s(self) -> float:
        """When the CPU is done."""

    @property
    def gpu_end_s(self) -> float:
        """When the GPU is done."""


class ExpertsTimes(NamedTuple):
    """Predicted seconds of one layer from its router's answer until its experts' sum is there.

    Attributes
    ----------
    deciding_s
        Of the host, until the GPU has its work. The other instants count from there.
    shared_s
        Of the shared expert, which goes first where dense weights are.
    planned_s, end_s
        When everything is done, by the plan and with what that leaves out.
    cpu_end_s, gpu_end_s
        When each side is done, with what the plan leaves out.
    read_s
        Of reading experts from the disk.
    gpu_busy_s
        Seconds that the GPU computes routed experts, their launch included.
    joining_s
        From the later end until the sum is there.
    """

    deciding_s: float
    shared_s: float
    planned_s: float
    end_s: float
    cpu_end_s: float
    gpu_end_s: float
    read_s: float
    gpu_busy_s: float
    joining_s: float

    def terms(self) -> dict[str, float]:
        """Return the terms; experts count for the lane that ends last."""
        found = {DECIDING: self.deciding_s, DENSE: self.shared_s}
        end_s = self.end_s
        if self.read_s and end_s > self.planned_s:
            found[DISK] = end_s - self.planned_s
            end_s = self.planned_s
        if self.cpu_end_s >= self.gpu_end_s:
            last = CPU
        else:
            # The GPU lane is the link's when its last expert starts as its copy arrives.
            waited = self.gpu_end_s > self.shared_s + self.gpu_busy_s * 1.001
            last = LINK if waited else GPU
        found[last] = end_s - self.shared_s
        found[JOINING] = self.joining_s
        return found


def experts_times(
    cost: CostModel,
    tokens: int,
    work: LayerWork,
    plan: Plan,
    link_end_s: float,
    read: Sequence[int] = (),
) -> ExpertsTimes:
    """Predict one layer's experts as they were placed.

    Copies slow the CPU down while both run; what was measured of joining includes that. Experts
    on disk are read one after the other; the last of them is computed when all are read.

    Parameters
    ----------
    cost
        Model and machine.
    tokens
        Tokens of the step.
    work, plan
        What was asked, and where each expert runs.
    link_end_s
        When the link is done with the plan's copies and with what it copies beyond them.
    read
        Experts that come from the disk first.
    """
    experts = cost.experts
    deciding_s, joining_s = cost.host_s(tokens, len(plan.copies))
    shared_s, cpu_end_s, gpu_end_s = work.gpu_free_s, plan.cpu_end_s, plan.gpu_end_s
    planned_s = end_s = max(cpu_end_s, gpu_end_s, shared_s)
    if plan.cpu and not joining_s and cost.cpu_slowdown != 1.0:
        cpu_end_s = contended_s(cpu_end_s, link_end_s, cost.cpu_slowdown)
        end_s = max(cpu_end_s, gpu_end_s, shared_s)
    read_s = gpu_busy_s = 0.0
    if read:
        load = dict(work.loads)[read[-1]]
        read_s = cost.disk_read(len(read)).value
        if not set(read).isdisjoint(plan.cpu):
            cpu_end_s = max(cpu_end_s, read_s + experts.cpu_s(load))
        if not set(read).isdisjoint(plan.copies):
            gpu_end_s = max(gpu_end_s, read_s + experts.copy_s() + experts.gpu_s(load))
        end_s = max(cpu_end_s, gpu_end_s, shared_s)
    if plan.gpu and tokens == 1:
        gpu_busy_s = experts.gpu_start_s + len(plan.gpu) * experts.gpu_s(1)
    elif plan.gpu:
        loads = dict(work.loads)
        gpu_busy_s = experts.gpu_start_s + sum([experts.gpu_s(loads[one]) for one in plan.gpu])
    return ExpertsTimes(
        deciding_s,
        shared_s,
        planned_s,
        end_s,
        cpu_end_s,
        gpu_end_s,
        read_s,
        gpu_busy_s,
        joining_s,
    )


def contended_s(cpu_s: float, link_s: float, slowdown: float) -> float:
    """Return how long CPU work of ``cpu_s`` takes while the link copies for its first ``link_s``.

    Both read the same memory: until the link is done, the CPU loses ``1 - 1/slowdown`` of the
    time.
    """
    return min(cpu_s * slowdown, cpu_s + link_s * (1 - 1 / slowdown))


def overhead(
    cost: CostModel, tokens: int, extras: Sequence[str] = (), *, first: bool = False
) -> Estimate:
    """Predict what surrounds the layers and the head of a step.

    Parameters
    ----------
    cost
        Model and machine.
    tokens
        Tokens of the step, over all sequences.
    extras
        What is done for each token besides: see :func:`extra`.
    first
        Whether the step leads to the first token.
    """
    return sum((extra(cost, name, first=first) for name in extras), cost.call(tokens))


def extra(cost: CostModel, term: str, *, first: bool) -> Estimate:
    """Predict what one of ``EXTRAS`` adds to a step.

    Text adds nothing to the ``first`` token, which is there before it is written.
    """
    return cost.extra(term) * (0.0 if first and term == TEXT else 1.0)
