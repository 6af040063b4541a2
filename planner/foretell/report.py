"""Writes a dry run as tables, which all ways of writing share, and as Markdown and JSON.

The JSON is a stable interface. ``schema`` is ``hybrid.plan/1``; fields may be added under the
same number, a changed meaning raises it. Durations are ``{"value_s", "source", "error_s"}`` or
plain seconds in fields that end in ``_s``; sizes are bytes in fields that end in ``_bytes``.

==============  =====================================================================
field           meaning
==============  =====================================================================
model           name, family, parameter counts, layers, experts, top_k, unread (fields)
hardware        name, summary
request         formats, context, prompt, tokens, batch, seed, trace
fit             fits, shortage, items (name, place, bytes), vram_bytes, ram_bytes,
                slots per MoE layer, slots_shared (equal, or by popularity), how experts
                lie in host memory (pinned, file-backed), share of experts in RAM
routing         source and origin of the chosen experts
ttft, tpot      durations
tokens_per_s    of all sequences together
terms           term -> duration; they add up to tpot
prefill_terms   term -> duration; they add up to ttft
binding         the resource the largest term waits for
hit_rate        hits over activated experts in decode
layers          per MoE layer: slots, hit_rate, and experts per token that run on the cpu,
                resident on the GPU, or copied
alternatives    other rules on the same routing: ttft_s, tpot_s, hit_rate
lower_bound_s   no placement of these experts has a smaller tpot with this cache's contents
prefetch        experts fetched in decode before they were asked for (fetched), those
                then used, and those kept in idle link time after their use (refilled)
why             sentences
changes         what would help most: ttft_s, tpot_s, changes_output
remedies        when it does not fit: sentences
==============  =====================================================================

All after ``fit`` but ``remedies`` is null when the model does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from planner.describe.estimate import Estimate
from planner.describe.model import ModelSpec
from planner.foretell.dryrun import PlanResult, Prediction
from planner.foretell.request import Request

SCHEMA = "hybrid.plan/1"
GIB = 2**30
_BANDS = 8


@dataclass(frozen=True)
class Table:
    """A titled table of text; numbers are formatted, one unit per column.

    Parameters
    ----------
    title
        What it shows.
    columns
        Headings; all but the first column are numbers, set to the right, unless ``prose``.
    rows
        Cells.
    prose
        Whether the cells are sentences.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False


def tables(result: PlanResult) -> list[Table]:
    """Return the report's tables in the order of reading."""
    found = [_summary(result), _fit(result)]
    prediction = result.prediction
    if prediction is None:
        remedies = tuple((remedy,) for remedy in result.remedies)
        return [*found, Table("What fits instead", ("",), remedies, prose=True)]
    found += [
        _terms(prediction),
        _layers(prediction, result.fit.slots),
        Table("Why", ("",), tuple((line,) for line in prediction.why), prose=True),
        _alternatives(prediction),
        _changes(prediction),
    ]
    return [table for table in found if table.rows]


def _summary(result: PlanResult) -> Table:
    request, model = result.request, result.request.model
    rows = [
        (
            "model",
            f"{model.name}: {_billions(model.total_params)} parameters, "
            f"{_billions(model.active_params)} active; {_told_experts(model)}",
        ),
        *_doubts(model),
        ("hardware", f"{request.hardware.name}: {request.hardware.summary}"),
        (
            "request",
            f"{_formats(request)}, context {request.context}, "
            f"prompt {request.prompt}, batch {request.batch}",
        ),
    ]
    prediction = result.prediction
    if prediction is None:
        rows.append(("verdict", f"does not fit: {result.fit.shortage}"))
        return Table("Plan", ("", ""), tuple(rows), prose=True)
    rate = request.batch / prediction.tpot.value
    together = f" of all {request.batch} sequences" if request.batch > 1 else ""
    rows += [
        *(
            [("routing", f"{prediction.routing_origin} ({prediction.routing_source})")]
            if model.moe_layers
            else []
        ),
        ("verdict", "fits" + _disk_note(result)),
        *_placement(result),
        ("time to first token", f"{_duration(prediction.ttft, 's')} for {request.prompt} tokens"),
        (
            "time per token",
            f"{_duration(prediction.tpot, 'ms')}, that is {rate:.1f} tokens/s{together}",
        ),
        ("binding resource", prediction.binding),
    ]
    if model.moe_layers:
        rows.append(("hit rate", _hit_rate(result)))
    return Table("Plan", ("", ""), tuple(rows), prose=True)


def _told_experts(model: ModelSpec) -> str:
    """Say how many experts there are, and how many of them a token uses."""
    if not model.moe_layers:
        return f"{len(model.layers)} layers, no experts to share"
    experts = model.experts
    return f"{model.moe_layers} MoE layers of {experts.count} experts, {experts.top_k} per token"


def _formats(request: Request) -> str:
    """Say what weights are stored as."""
    dense = f"dense {_dense(request)}"
    return f"experts {request.experts}, {dense}" if request.model.moe_layers else dense


def _doubts(model: ModelSpec) -> Iterator[tuple[str, str]]:
    """What the counts of a model may be wrong for."""
    if model.unread:
        fields = ", ".join(model.unread)
        yield "not read", f"{fields} of its config.json: layers may be of other kinds than counted"
    if len(model.kinds_of_experts) > 1:
        yield "layers", "differ in their experts; times are of layers with the most and largest"


def _placement(result: PlanResult) -> Iterator[tuple[str, str]]:
    """What the runtime says when it places the model."""
    if not result.request.model.moe_layers:
        return
    if result.request.hardware.gpu is not None:
        yield "GPU", result.fit.slots_told(sum(result.fit.slots))
    yield "RAM", result.fit.host_told()


def _disk_note(result: PlanResult) -> str:
    if result.fit.in_ram >= 1:
        return ""
    return f", but only {result.fit.in_ram:.0%} of the experts stay in RAM; others are read again"


def _hit_rate(result: PlanResult) -> str:
    """Say how many experts were resident, and which policy kept them."""
    prediction = result.prediction
    assert prediction is not None
    kept = f" with the policy {result.request.policy}" if result.request.hardware.gpu else ""
    return f"{prediction.run.hit_rate:.1%}{kept}{_prefetch_note(prediction)}"


def _prefetch_note(prediction: Prediction) -> str:
    run, note = prediction.run, ""
    if run.prefetched:
        used = run.prefetch_used / run.prefetched
        note = f"; {run.prefetched} experts prefetched, {used:.0%} of them used"
    return note + (f"; {run.refilled} kept after use" if run.refilled else "")


def _fit(result: PlanResult) -> Table:
    fit = result.fit
    rows = [
        (item.name, *(_gib(item.bytes) if item.place == place else "" for place in _PLACES))
        for item in fit.listed
    ]
    rows.append(("used", *(_gib(fit.used(place)) for place in _PLACES)))
    has_gpu = _gib(fit.vram_bytes) if fit.vram_bytes else "none"
    rows.append(("available", has_gpu, _gib(fit.ram_bytes), ""))
    return Table("Memory", ("", "VRAM GiB", "RAM GiB", "disk GiB"), tuple(rows))


_PLACES = ("vram", "ram", "disk")


def _terms(prediction: Prediction) -> Table:
    rows = [
        (
            term,
            f"{decode.value * 1e3:.2f}",
            f"{decode.value / prediction.tpot.value:.0%}",
            f"{prediction.prefill_terms[term].value * 1e3:.1f}",
            str((decode if decode.value else prediction.prefill_terms[term]).source),
        )
        for term, decode in prediction.terms.items()
        if decode.value or prediction.prefill_terms[term].value
    ]
    total = (f"{prediction.tpot.value * 1e3:.2f}", "100%", f"{prediction.ttft.value * 1e3:.1f}")
    rows.append(("total", *total, str(prediction.tpot.source)))
    columns = ("", "token ms", "share", "prompt ms", "source")
    return Table("Where the time goes", columns, tuple(rows))


def _layers(prediction: Prediction, slots: tuple[int, ...]) -> Table:
    run = prediction.run
    band = max(1, -(-len(run.layers) // _BANDS))
    rows = []
    for first in range(0, len(run.layers), band):
        part = run.layers[first : first + band]
        last = first + len(part) - 1
        steps = len(run.decode) * len(part)
        activated = sum(counts["activated"] for counts in part)
        rows.append(
            (
                f"{first}-{last}" if last > first else str(first),
                f"{sum(slots[first : last + 1]) / len(part):.1f}",
                f"{sum(counts['hits'] for counts in part) / max(1, activated):.1%}",
                *(f"{sum(c[where] for c in part) / steps:.2f}" for where in _WHERE),
            )
        )
    columns = ("MoE layers", "slots", "hit rate", "on CPU", "resident", "copied")
    return Table("Experts per layer and token", columns, tuple(rows))


_WHERE = ("cpu", "resident", "copied")


def _alternatives(prediction: Prediction) -> Table:
    rows = [
        (
            f"{other.name}: {other.meaning}",
            f"{other.ttft_s:.3f}",
            f"{other.tpot_s * 1e3:.2f}",
            f"{other.hit_rate:.1%}",
            f"{other.tpot_s / prediction.tpot.value:.2f}",
        )
        for other in prediction.alternatives
    ]
    bound = prediction.run.bound_s
    rows.append(
        (
            "lower bound: with this plan's cache",
            "",
            f"{bound * 1e3:.2f}",
            "",
            f"{bound / prediction.tpot.value:.2f}",
        )
    )
    columns = ("", "first token s", "token ms", "hit rate", "times ours")
    return Table("Beside other rules", columns, tuple(rows))


def _changes(prediction: Prediction) -> Table:
    rows = tuple(
        (
            change.what + (" (changes the output)" if change.changes_output else ""),
            f"{change.ttft_s:.3f}",
            f"{change.tpot_s * 1e3:.2f}",
            f"{prediction.tpot.value / change.tpot_s - 1:+.0%}",
        )
        for change in prediction.changes
    )
    return Table("What would help most", ("", "first token s", "token ms", "speed"), rows)


def to_markdown(found: Iterable[Table]) -> str:
    """Return tables as Markdown."""
    lines = []
    for table in found:
        lines += [f"## {table.title}", ""]
        if len(table.columns) == 1:
            lines += [f"- {row[0]}" for row in table.rows]
        else:
            other = "---" if table.prose else "---:"
            marks = ["---", *[other] * (len(table.columns) - 1)]
            lines += [f"| {' | '.join(cells)} |" for cells in (table.columns, marks, *table.rows)]
        lines.append("")
    return "\n".join(lines)


def to_json(result: PlanResult) -> str:
    """Return the report as JSON; see the module's text for the schema."""
    return json.dumps(to_dict(result), indent=2, sort_keys=False)


def to_dict(result: PlanResult) -> dict[str, Any]:
    """Return the report as plain values."""
    request, fit = result.request, result.fit
    model = request.model
    return {
        "schema": SCHEMA,
        "model": {
            "name": model.name,
            "family": model.family,
            "total_params": model.total_params,
            "active_params": model.active_params,
            "expert_params": model.expert_params,
            "dense_params": model.dense_params,
            "layers": len(model.layers),
            "moe_layers": model.moe_layers,
            "experts": model.experts.count,
            "top_k": model.experts.top_k,
            "unread": list(model.unread),
        },
        "hardware": {"name": request.hardware.name, "summary": request.hardware.summary},
        "request": _request(request),
        "fit": {
            "fits": fit.fits,
            "shortage": fit.shortage,
            "items": [asdict(item) for item in fit.listed],
            "vram_bytes": fit.vram_bytes,
            "ram_bytes": fit.ram_bytes,
            "slots": list(fit.slots),
            "slots_shared": fit.shared.name.lower(),
            "host": fit.host,
            "in_ram": fit.in_ram,
        },
        **_predicted(result),
        "remedies": list(result.remedies),
    }


_PREDICTED = (
    "routing",
    "ttft",
    "tpot",
    "tokens_per_s",
    "terms",
    "prefill_terms",
    "binding",
    "hit_rate",
    "layers",
    "alternatives",
    "lower_bound_s",
    "prefetch",
    "why",
    "changes",
)


def _predicted(result: PlanResult) -> dict[str, Any]:
    """Return the fields that a model that does not fit leaves null."""
    prediction = result.prediction
    if prediction is None:
        return dict.fromkeys(_PREDICTED)
    run, slots = prediction.run, result.fit.slots
    layers = [
        {
            "layer": layer,
            "slots": slots[layer],
            "hit_rate": counts["hits"] / max(1, counts["activated"]),
            **{where: counts[where] / len(run.decode) for where in _WHERE},
        }
        for layer, counts in enumerate(run.layers)
    ]
    values = (
        {"source": prediction.routing_source, "origin": prediction.routing_origin},
        _estimate(prediction.ttft),
        _estimate(prediction.tpot),
        result.request.batch / prediction.tpot.value,
        {term: _estimate(value) for term, value in prediction.terms.items()},
        {term: _estimate(value) for term, value in prediction.prefill_terms.items()},
        prediction.binding,
        run.hit_rate,
        layers,
        [asdict(other) for other in prediction.alternatives],
        run.bound_s,
        {"fetched": run.prefetched, "used": run.prefetch_used, "refilled": run.refilled},
        list(prediction.why),
        [asdict(change) for change in prediction.changes],
    )
    return dict(zip(_PREDICTED, values, strict=True))


def _dense(request: Request) -> str:
    """Say what dense weights are stored as, and what a run has them in where that differs."""
    widened = f" ({request.dense_there} on the GPU)"
    return request.dense + (widened if request.dense != request.dense_there else "")


def _request(request: Request) -> dict[str, Any]:
    names = ("experts", "dense", "context", "prompt", "tokens", "batch", "policy", "seed")
    asked = {name: getattr(request, name) for name in names}
    return {**asked, "trace": request.trace and request.trace.name}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value_s": estimate.value, "source": estimate.source, "error_s": estimate.error}


def _duration(estimate: Estimate, unit: str) -> str:
    scale, digits = (1.0, 3) if unit == "s" else (1e3, 1)
    error = "" if estimate.error is None else f" ± {estimate.error * scale:.{digits}f}"
    return f"{estimate.value * scale:.{digits}f}{error} {unit} ({estimate.source})"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
