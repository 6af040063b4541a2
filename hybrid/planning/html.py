"""A plan as one self-contained HTML page: the report's tables, charts and a timeline."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from planner.foretell.dryrun import PlanResult
from planner.foretell.memory import Fit
from planner.foretell.report import GIB, tables
from planner.foretell.run import Event

LANES = ("cpu", "gpu", "link", "disk")
_SHOWN_S = 0.05
"""How much of decode the timeline holds: a page stays small and quick."""


@dataclass(frozen=True)
class Part:
    """A labelled piece of a bar; ``share`` is its width in percent of the whole chart."""

    label: str
    text: str
    share: float
    color: int


@dataclass(frozen=True)
class Bar:
    """A bar of one or more parts, and what is written at its end."""

    label: str
    parts: tuple[Part, ...]
    text: str


def to_html(result: PlanResult) -> str:
    """Return the page; it loads nothing from anywhere."""
    source = (files("hybrid.planning") / "page.html.j2").read_text("utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    return template.render(
        title=f"{result.request.model.name} on {result.request.hardware.name}",
        tables=tables(result),
        memory=_memory(result.fit),
        **(_charts(result) if result.prediction else {}),
    )


def _charts(result: PlanResult) -> dict[str, Any]:
    prediction = result.prediction
    assert prediction is not None
    run = prediction.run
    terms = [
        _stack("token", {t: e.value * 1e3 for t, e in prediction.terms.items()}, "ms"),
        _stack("prompt", {t: e.value * 1e3 for t, e in prediction.prefill_terms.items()}, "ms"),
    ]
    ours = ("this plan", prediction.tpot.value)
    times = [ours, *((other.name, other.tpot_s) for other in prediction.alternatives)]
    times.append(("lower bound", run.bound_s))
    slowest = max(seconds for _, seconds in times)
    rules = [
        Bar(name, (Part(name, "", 100 * seconds / slowest, number > 0),), f"{seconds * 1e3:.1f} ms")
        for number, (name, seconds) in enumerate(times)
    ]
    hits = [counts["hits"] / max(1, counts["activated"]) for counts in run.layers]
    return {"terms": terms, "rules": rules, "hits": hits, "timeline": _timeline(run.events)}


def _stack(label: str, values: dict[str, float], unit: str) -> Bar:
    """One bar as wide as the chart, split by ``values``."""
    total = sum(values.values())
    parts = tuple(
        Part(name, f"{value:.2f} {unit}", 100 * value / total, color)
        for color, (name, value) in enumerate(values.items())
        if value
    )
    return Bar(label, parts, f"{total:.1f} {unit}")


def _memory(fit: Fit) -> list[Bar]:
    """VRAM and RAM: what is used, as wide as the larger of used and available."""
    bars = []
    for place, size in (("vram", fit.vram_bytes), ("ram", fit.ram_bytes)):
        whole = max(size, fit.used(place))
        if not whole:
            continue
        parts = tuple(
            Part(item.name, f"{item.bytes / GIB:.2f} GiB", 100 * item.bytes / whole, color)
            for color, item in enumerate(item for item in fit.items if item.place == place)
        )
        text = f"{fit.used(place) / GIB:.1f} of {size / GIB:.1f} GiB"
        bars.append(Bar(place.upper(), parts, text))
    return bars


def _timeline(events: list[Event]) -> list[dict[str, Any]]:
    """The first decode tokens' spans: lane, name, start and duration in milliseconds."""
    heads = [event.end_s for event in events if event.name == "head"]
    first_s = heads[0] if heads else 0.0
    return [
        {
            "lane": LANES.index(event.lane),
            "name": event.name,
            "at": round((event.start_s - first_s) * 1e3, 4),
            "ms": round((event.end_s - event.start_s) * 1e3, 4),
        }
        for event in events
        if event.lane in LANES and first_s <= event.start_s < first_s + _SHOWN_S
    ]
