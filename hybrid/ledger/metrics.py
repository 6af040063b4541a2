"""What a run measured, as values and as text; every number says where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hybrid.formats.notes import Note

_MIB = 1 << 20


class Figure(NamedTuple):
    """A number with its unit and its source; ``value`` is None when it was not measured."""

    value: float | None
    unit: str
    source: str

    def __str__(self) -> str:
        if self.value is None:
            return f"not measured ({self.source})"
        return f"{_format(self.value, self.unit)} ({self.source})"


@dataclass(frozen=True, kw_only=True)
class Speculated:
    """What came of the drafts of one call.

    Attributes
    ----------
    asked
        What the user asked for.
    refused
        Why there could be none; None where there could.
    drafted, accepted
        Tokens.
    steps
        That computed a draft.
    gained_s
        Seconds that as many steps of a single token take, less what these steps took.
    """

    asked: str
    refused: str | None
    drafted: int
    accepted: int
    steps: int
    gained_s: float

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.asked}: none, {self.refused}"
        if not self.steps:
            return f"{self.asked}: none that would have paid"
        gained = f"{_format(abs(self.gained_s), 's')} {'lost' if self.gained_s < 0 else 'gained'}"
        return (
            f"{self.asked}: {self.accepted} of {self.drafted} drafted tokens accepted in "
            f"{self.steps} steps, {self.drafted / self.steps:.1f} in each; {gained}"
        )


@dataclass(frozen=True, kw_only=True)
class GenerationTimes:
    """One call of ``generate``.

    Attributes
    ----------
    sequences
        Sequences in the batch; the token counts below are of one sequence.
    prompt_tokens, new_tokens
        Tokens of the prompt that were computed, and tokens generated.
    ttft_s
        From the call to the first new token; None when no token was seen as it came.
    decode_s
        From the first new token to the last.
    ended
        Why generation ended: ``"end token"``, ``"stop string"``, ``"max_new_tokens"``,
        ``"context full"``, ``"interrupted"``, or ``"end token or limit"`` where ids were asked
        for and transformers alone knows.
    extras
        ``"sampling"`` where tokens were drawn and not the likeliest ones, ``"text"`` where they
        were written, too.
    kept_tokens
        Tokens at the prompt's beginning that a kept cache had already.
    speculated
        What came of drafts; None where none were asked for.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None
    decode_s: float
    ended: str
    extras: tuple[str, ...] = ()
    kept_tokens: int = 0
    speculated: Speculated | None = None

    def figures(self) -> dict[str, Figure]:
        """Return the counts and rates that a user compares, by name."""
        prompt_rate = decode_rate = None
        if self.ttft_s:
            prompt_rate = self.sequences * self.prompt_tokens / self.ttft_s
        if self.new_tokens > 1 and self.decode_s > 0:
            decode_rate = self.sequences * (self.new_tokens - 1) / self.decode_s
        seen = "measured" if self.ttft_s is not None else "tokens were not seen as they came"
        steps = f"measured over {self.new_tokens - 1} steps"
        return {
            "prompt_tokens": Figure(self.prompt_tokens, "tokens", _counted(self.kept_tokens)),
            "new_tokens": Figure(self.new_tokens, "tokens", f"counted; ended: {self.ended}"),
            "ttft_s": Figure(self.ttft_s, "s", seen),
            "prompt_tokens_per_s": Figure(prompt_rate, "tokens/s", "prompt tokens / TTFT"),
            "decode_tokens_per_s": Figure(
                decode_rate, "tokens/s", steps if decode_rate else "fewer than two new tokens"
            ),
        }


def _counted(kept_tokens: int) -> str:
    """Say how a prompt's tokens were counted."""
    return f"counted; {kept_tokens} before them were kept" if kept_tokens else "counted"


STEP = "a step"
"""The name of the term that is all of a step."""
CPU_LANE, GPU_LANE, LINK_LANE = LANES = ("cpu", "gpu", "link")
"""Who works while the experts run."""
JOIN = "join"
"""How long the host then waits for the device, its own experts being done."""
WITHIN = (*LANES, JOIN)
"""What happens while the experts run: all at once, so these are no parts of the whole."""
_A_LINE = 6
"""Layers in a line of the report."""
CLOSE = 0.1
"""Share that a prediction may be off by before the report says which term is to blame."""


class Term(NamedTuple):
    """A part of a step's time: predicted, and measured; None where it cannot be told apart.

    ``error`` is what the prediction's standard deviation is relative to it, where that is known;
    ``layer`` is the layer whose share it is, None for all of them: of those with experts where they
    are shared with a device, else of all decoder layers.
    """

    phase: str
    name: str
    predicted_s: float
    measured_s: float | None
    error: float | None = None
    layer: int | None = None

    def __str__(self) -> str:
        predicted = f"predicted {_format(self.predicted_s * 1e3, 'ms')}"
        if self.error:
            predicted += f" \u00b1 {self.error:.0%}"
        if self.measured_s is None:
            return f"{predicted}, measured only as part of the whole"
        off = "" if self.residual is None else f" (predicted {self.residual:+.0%})"
        return f"{predicted}, measured {_format(self.measured_s * 1e3, 'ms')}{off}"

    @property
    def residual(self) -> float | None:
        """Predicted over measured, less 1; None where nothing was measured."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else None


def most_off(terms: Sequence[Term]) -> Iterator[tuple[str, str]]:
    """Name the term that a phase's prediction is off by most, where the whole is off."""
    for whole in terms:
        if whole.name != STEP or whole.measured_s is None or whole.residual is None:
            continue
        if abs(whole.residual) <= CLOSE:
            continue
        within = (STEP, *WITHIN)
        mine = [term for term in terms if term.phase == whole.phase and term.name not in within]
        parts = [
            (term.measured_s - term.predicted_s, term.name)
            for term in mine
            if term.measured_s is not None
        ]
        if unknown := [term.name for term in mine if term.measured_s is None]:
            rest_s = whole.measured_s - whole.predicted_s - sum(off_s for off_s, _ in parts)
            rest = " and ".join(unknown) if len(unknown) < 3 else "what only the whole tells"
            parts.append((rest_s, rest))
        if parts:
            off_s, name = max(parts, key=lambda part: abs(part[0]))
            than = "longer" if off_s > 0 else "less"
            took = f"took {abs(off_s) * 1e3:.3g} ms {than} than predicted"
            yield f"{whole.phase} is off", f"most by {name}: {took}"


def by_layer(terms: Sequence[Term]) -> Iterator[tuple[str, str]]:
    """Put every layer's share of a step in a few lines a phase."""
    sums: dict[tuple[str, int], list[float]] = {}
    for term in terms:
        if term.layer is not None and term.name not in WITHIN:
            both = sums.setdefault((term.phase, term.layer), [0.0, 0.0])
            both[0] += term.predicted_s
            both[1] += term.measured_s or 0.0
    for phase in dict.fromkeys(phase for phase, _ in sums):
        shares = [
            f"{layer}: {predicted_s * 1e3:.3g} | {measured_s * 1e3:.3g}"
            for (owner, layer), (predicted_s, measured_s) in sums.items()
            if owner == phase
        ]
        for first in range(0, len(shares), _A_LINE):
            line = ", ".join(shares[first : first + _A_LINE])
            yield f"{phase} layers", f"{line} ms predicted | measured"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What ran, how, and how fast. ``str()`` gives the text, ``to_dict()`` the JSON value.

    Attributes
    ----------
    model, family
        The directory that was loaded, and its transformers class.
    experts_format, dense_format
        How the weights are stored.
    compute_dtype
        The dtype of dense layers that are not quantized, with the reason for it.
    decode_path
        What computes single tokens, and why.
    simd_level, threads
        What the kernels run on.
    many_tokens
        Which products the experts of many tokens take; None where there are no experts.
    figures
        Every number, by name.
    placement
        How the model lies on a device; None on the CPU alone.
    chosen
        How the last call's tokens were chosen.
    speculated
        What came of drafts in it; None where none were asked for.
    terms
        What a step's time consists of, the whole first, predicted and measured.
    layers
        The same of every layer, where that was measured.
    predictions
        What those are made from, or what would make some; None where there is nothing to predict.
    slow_paths
        Everything that ran slower than it could.
    """

    model: str
    family: str
    experts_format: str
    dense_format: str
    compute_dtype: str
    decode_path: str
    simd_level: str
    threads: str
    many_tokens: str | None
    placement: str | None = None
    chosen: str | None = None
    speculated: Speculated | None = None
    figures: dict[str, Figure]
    terms: tuple[Term, ...] = ()
    layers: tuple[Term, ...] = ()
    predictions: str | None = None
    slow_paths: tuple[Note, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a value that ``json.dumps`` takes."""
        return asdict(self) | {
            "figures": {name: figure._asdict() for name, figure in self.figures.items()},
            "terms": [term._asdict() for term in self.terms],
            "layers": [term._asdict() for term in self.layers],
            "slow_paths": [path._asdict() for path in self.slow_paths],
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<20} {value}" for name, value in self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "model", f"{self.model} ({self.family})"
        yield "experts", self.experts_format
        yield "dense layers", f"{self.dense_format}, computed in {self.compute_dtype}"
        yield "single tokens", self.decode_path
        yield "SIMD level", self.simd_level
        yield "threads", self.threads
        if self.many_tokens is not None:
            yield "experts in prompts", self.many_tokens
        if self.placement is not None:
            yield "device", self.placement
        if self.chosen is not None:
            yield "tokens are", self.chosen
        if self.speculated is not None:
            yield "drafts", str(self.speculated)
        for name, figure in self.figures.items():
            yield _LABELS[name], str(figure)
        if self.predictions is not None:
            yield "predictions", self.predictions
        for term in self.terms:
            yield f"{term.phase}", f"{term.name}: {term}"
        yield from by_layer(self.layers)
        yield from most_off(self.terms)
        if not self.slow_paths:
            yield "slow paths", "none"
        for path in self.slow_paths:
            yield "slow path", str(path)


_LABELS = {
    "store_bytes": "expert store",
    "load_s": "load",
    "prompt_tokens": "prompt",
    "new_tokens": "generated",
    "ttft_s": "TTFT",
    "prompt_tokens_per_s": "prompt rate",
    "decode_tokens_per_s": "decode rate",
    "hit_rate": "hit rate",
    "prefetch_precision": "prefetch precision",
    "prefetch_coverage": "prefetch coverage",
    "prefetch_useful_bytes": "useful prefetches",
    "prefetch_wasted_bytes": "wasted prefetches",
    "peak_memory_bytes": "peak memory",
}


def _format(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / _MIB:,.1f} MiB"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "tokens":
        return f"{value:,.0f} tokens"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def summary_line(figures: dict[str, Figure]) -> str:
    """Return the one line that ends a run: counts, prompt rate, TTFT, decode rate, memory."""

    def show(name: str) -> str:
        figure = figures[name]
        return "n/a" if figure.value is None else _format(figure.value, figure.unit)

    return (
        f"prompt {show('prompt_tokens')}, {show('prompt_tokens_per_s')}"
        f" | TTFT {show('ttft_s')}"
        f" | decode {show('new_tokens')}, {show('decode_tokens_per_s')}"
        f" | peak memory {show('peak_memory_bytes')}"
    )
