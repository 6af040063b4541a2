"""From the times of whole steps to those of their parts.

Every part is timed by itself: in transformers' code around its modules, and where all layers of a
single token are one compiled call, by that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from planner.cost.step_times import StepTimes
from planner.describe.model import Layer, ModelSpec
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER

_Key = tuple[str, str, int]
"""A part's term, kind and weights."""
_INTERRUPTED = 2
"""A sample of so many times the median: something else had the processor meanwhile."""


def typical(samples: Sequence[float]) -> float:
    """Return what a step takes on average: a run is the sum of its steps, slower ones included.

    Interrupted ones are not; where a machine is calm the median would be the same.
    """
    most = _INTERRUPTED * median(samples)
    return fmean(s for s in samples if s <= most) if most > 0 else fmean(samples)


@dataclass(frozen=True)
class Part:
    """What a part of the model took: seconds of single steps, of one layer where it is a layer's.

    ``term``, ``kind``, ``params``, ``tokens``, ``context`` and ``piece`` are those of
    ``planner.describe.hardware.TermPoint``.
    """

    term: str
    kind: str
    params: int
    tokens: int
    context: int
    samples: tuple[float, ...]
    piece: int = 0


class Planned(NamedTuple):
    """What the plan of a layer on a device had: how many copies, and when its experts are done."""

    copies: int
    seconds: float


@dataclass(frozen=True)
class Pass:
    """One forward pass, measured.

    Attributes
    ----------
    whole_s
        All of it, from token to token.
    times
        Its layers and the head; on a device as :meth:`StepTimes.as_timed` has them.
    plans
        Of its layers with experts, where those are shared with a device.
    """

    whole_s: float
    times: StepTimes
    plans: tuple[Planned, ...] = ()

    @property
    def around_s(self) -> float:
        """What surrounds the layers and the head."""
        return self.whole_s - self.times.duration_s


def in_modules(
    model: ModelSpec,
    layers: Sequence[Layer],
    scale: float,
    passes: Sequence[Pass],
    tokens: int,
    context: int,
    piece: int = 0,
) -> Iterator[Part]:
    """Parts of passes on the CPU alone.

    Parameters
    ----------
    model, layers
        The model, and those of its layers that ran.
    scale
        How many times larger the model's head is than the one that ran.
    passes
        With attention, the MLP besides and the experts of each layer.
    tokens, context
        Of each pass.
    piece
        So many of the tokens are computed at a time; 0 is all of them.
    """
    samples = defaultdict[_Key, list[float]](list)
    for step in passes:
        found = defaultdict[_Key, list[float]](list)
        for layer, terms in zip(layers, step.times.layers, strict=True):
            attention, feed_forward = parts_of_layer(layer)
            found[attention].append(terms[MIXER])
            found[feed_forward].append(terms[DENSE])
        found[HEAD, "", model.head_params].append(step.times.around[HEAD] * scale)
        found[CALL, "", model.head_params].append(max(0.0, step.around_s))
        if tokens == 1:
            moe = sum(layer.moe for layer in layers)
            each_s = step.times.terms[CPU] / moe / model.experts.top_k
            found[CPU, "", model.experts.params_each].append(each_s)
        for key, values in found.items():
            samples[key].append(fmean(values))
    for (term, kind, params), seconds in samples.items():
        yield Part(
            term, kind, params, tokens, context, tuple(seconds), 0 if term == CALL else piece
        )


def parts_of_layer(layer: Layer) -> tuple[_Key, _Key]:
    """Return what tells the points of a layer's attention, and those of its MLP, from others."""
    mixer = layer.mixer
    return (MIXER, mixer.kind, mixer.params), (DENSE, "", layer.ffn_params)


def single_tokens(
    model: ModelSpec, layers: Sequence[Layer], scale: float, steps: Mapping[int, Sequence[Pass]]
) -> Iterator[Part]:
    """Parts of single tokens that are one compiled call.

    Only attention depends on the context; the others are taken together over all contexts.

    Parameters
    ----------
    model, layers, scale
        As of :func:`in_modules`.
    steps
        Context to steps, as of :func:`in_modules`.
    """
    together = defaultdict[_Key, list[float]](list)
    for context, decoded in steps.items():
        for part in in_modules(model, layers, scale, decoded, 1, context):
            if part.term == MIXER:
                yield part
            else:
                together[part.term, part.kind, part.params] += part.samples
    for (term, kind, params), seconds in together.items():
        yield Part(term, kind, params, 1, 1, tuple(seconds))


def totals(
    model: ModelSpec, layers: Sequence[Layer], passes: Sequence[Pass], parts: Sequence[Part]
) -> dict[str, float]:
    """Return what a step of all ``layers`` consists of, by the names that the planner predicts.

    Parameters
    ----------
    model, layers
        As of :func:`in_modules`.
    passes
        Steps.
    parts
        Of those steps.
    """
    seconds = {(part.term, part.kind, part.params): typical(part.samples) for part in parts}
    expert_s = seconds.get((CPU, "", model.experts.params_each))
    if expert_s is None:
        experts_s = typical([step.times.terms[CPU] for step in passes])
    else:
        experts_s = expert_s * model.experts.top_k * sum(layer.moe for layer in layers)
    mixers = [layer.mixer for layer in layers]
    return {
        MIXER: sum(seconds[MIXER, mixer.kind, mixer.params] for mixer in mixers),
        DENSE: sum(seconds[DENSE, "", layer.ffn_params] for layer in layers),
        CPU: experts_s,
        HEAD: seconds[HEAD, "", model.head_params],
        CALL: seconds[CALL, "", model.head_params],
    }


def extra(
    term: str,
    model: ModelSpec,
    scale: float,
    turns: Sequence[tuple[Sequence[Pass], Sequence[Pass]]],
) -> Part:
    """What a step takes more around its layers and head where something is asked for besides.

    Parameters
    ----------
    term
        What is asked for.
    model, scale
        As of :func:`in_modules`; the scale is that of the term.
    turns
        Single tokens without it, and with it.
    """
    least_s = median(step.around_s for without, _ in turns for step in without)
    samples = tuple(
        scale * max(0.0, step.around_s - least_s) for _, steps in turns for step in steps
    )
    return Part(term, "", model.head_params, 1, 1, samples)
