"""From the times of whole steps to those of their parts.

Every part is timed by itself: in transformers' code around its modules, and where all layers of a
single token are one compiled call, by that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from planner.cost.terms import CALL, CPU, DENSE, HEAD, MIXER
from planner.describe.model import Layer, ModelSpec

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


@dataclass(frozen=True)
class Pass:
    """One forward pass: its whole time and its parts', by (part, layer)."""

    whole_s: float
    spans: Mapping[tuple[str, int], float]


def in_modules(
    model: ModelSpec,
    layers: Sequence[Layer],
    scale: float,
    passes: Sequence[Pass],
    tokens: int,
    context: int,
    piece: int = 0,
) -> Iterator[Part]:
    """Parts of passes through transformers' code.

    Parameters
    ----------
    model, layers
        The model, and those of its layers that ran.
    scale
        How many times larger the model's head is than the one that ran.
    passes
        With spans of ``layer``, ``feed_forward`` and ``experts`` of each layer, and of ``head``.
    tokens, context
        Of each pass.
    piece
        So many of the tokens are computed at a time; 0 is all of them.
    """
    samples = defaultdict[tuple[str, str, int], list[float]](list)
    for step in passes:
        found = defaultdict[tuple[str, str, int], list[float]](list)
        for index, layer in enumerate(layers):
            beside_s = step.spans.get(("feed_forward", index), 0.0)
            experts_s = step.spans.get(("experts", index), 0.0)
            attention_s = max(0.0, step.spans["layer", index] - beside_s - experts_s)
            found["attention", layer.mixer.kind, layer.mixer.params].append(attention_s)
            found["feed_forward", "", layer.ffn_params].append(beside_s)
        head_s = step.spans["head", 0]
        layers_s = sum(step.spans["layer", index] for index in range(len(layers)))
        found["head", "", model.head_params].append(head_s * scale)
        around_s = max(0.0, step.whole_s - layers_s - head_s)
        found["call", "", model.head_params].append(around_s)
        if tokens == 1:
            experts_s = sum(s for (name, _), s in step.spans.items() if name == "experts")
            moe = sum(layer.moe for layer in layers)
            each_s = experts_s / moe / model.experts.top_k
            found["expert", "", model.experts.params_each].append(each_s)
        for key, values in found.items():
            samples[key].append(fmean(values))
    for (term, kind, params), seconds in samples.items():
        yield Part(
            term, kind, params, tokens, context, tuple(seconds), 0 if term == "call" else piece
        )


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
        Context to steps, with spans as of :func:`in_modules`.
    """
    together = defaultdict[tuple[str, str, int], list[float]](list)
    for context, decoded in steps.items():
        for part in in_modules(model, layers, scale, decoded, 1, context):
            if part.term == "attention":
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
        Steps; in transformers' code with spans of ``experts``.
    parts
        Of those steps.
    """
    seconds = {(part.term, part.kind, part.params): typical(part.samples) for part in parts}
    expert_s = seconds.get(("expert", "", model.experts.params_each))
    if expert_s is None:
        experts_s = typical(
            [sum(s for (name, _), s in step.spans.items() if name == "experts") for step in passes]
        )
    else:
        experts_s = expert_s * model.experts.top_k * sum(layer.moe for layer in layers)
    mixers = [layer.mixer for layer in layers]
    return {
        MIXER: sum(seconds["attention", mixer.kind, mixer.params] for mixer in mixers),
        DENSE: sum(seconds["feed_forward", "", layer.ffn_params] for layer in layers),
        CPU: experts_s,
        HEAD: seconds["head", "", model.head_params],
        CALL: seconds["call", "", model.head_params],
    }


def aside(
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
    least_s = median(_around_s(step) for without, _ in turns for step in without)
    found = [_around_s(step) for _, steps in turns for step in steps]
    samples = tuple(scale * max(0.0, seconds - least_s) for seconds in found)
    return Part(term, "", model.head_params, 1, 1, samples)


def _around_s(step: Pass) -> float:
    """A step without its layers and head."""
    inner = ("experts", "feed_forward")  # parts of a layer
    return step.whole_s - sum(s for (name, _), s in step.spans.items() if name not in inner)
