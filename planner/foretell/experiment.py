"""A published experiment run again in the simulator, and its figures beside the published ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.decide import policies
from planner.decide.baselines import BASELINES
from planner.decide.director import Scheduler
from planner.decide.policies.static import StaticPopularity
from planner.decide.schedule import schedule
from planner.describe.checked_table import Fields
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.describe.routing_law import RECORDED
from planner.errors import SpecError
from planner.foretell.dryrun import Rule
from planner.foretell.report import Table
from planner.foretell.request import Request

SCHEMA = "hybrid.experiment/1"
FAR = 0.2
"""A ratio this far from the published one needs an explanation."""
_LIKE = "an experiment that ships (configs/experiments)"
_FIELDS = (
    "name",
    "source",
    "model",
    "hardware",
    "experts",
    "dense",
    "prompt",
    "tokens",
    "seed",
    "recorded_routing",
    "capacity",
    "published_prefill_s",
    "published_decode_s",
    "rows",
    "what_if",
    "notes",
)
_ROW = ("name", "schedule", "cache", "prefetch", "refill", "prefill", "decode")
_SCHEDULERS: dict[str, Scheduler] = {
    "exact": schedule,
    **{baseline.name: baseline for baseline in BASELINES},
}


@dataclass(frozen=True)
class Row:
    """One configuration: its rule, and the published speed-ups over the first row."""

    rule: Rule
    published: tuple[float | None, float | None]


@dataclass(frozen=True)
class Experiment:
    """What an experiment file asks for."""

    name: str
    source: str
    request: Request
    capacity: float
    """GPU slots of each layer as a share of its experts."""
    published_s: tuple[float, float]
    """Seconds of prefill and of a decode step in the first row, as published."""
    rows: tuple[Row, ...]
    what_if: tuple[str, HardwareSpec] | None
    """A reason and another machine that the same rows are run on."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One row's figures; speed-ups are over the first row."""

    name: str
    prefill_s: float
    decode_s: float
    hit_rate: float
    prefill_speedup: float
    decode_speedup: float
    published_prefill: float | None
    published_decode: float | None


def read_experiment(
    data: Mapping[str, Any],
    where: str,
    find_model: Callable[[str], ModelSpec],
    find_hardware: Callable[[str], HardwareSpec],
) -> Experiment:
    """Build an experiment from a parsed ``configs/experiments/*.toml``.

    Raises
    ------
    SpecError
        When a field is missing, unknown or impossible.
    """
    table = Fields(data, where, _LIKE)
    table.only(_FIELDS)
    model = find_model(table.text("model"))
    if table.flag("recorded_routing"):
        model = replace(model, routing=RECORDED)
    request = Request(
        model=model,
        hardware=find_hardware(table.text("hardware")),
        experts=table.text("experts"),
        dense=table.text("dense"),
        context=table.count("prompt") + table.count("tokens"),
        prompt=table.count("prompt"),
        tokens=table.count("tokens"),
        seed=table.count("seed", least=0),
    )
    if request.hardware.gpu is None:
        raise SpecError(
            f"{where}: {request.hardware.name} has no GPU",
            hint="an experiment compares ways to share experts with a GPU",
        )
    rows, notes = data.get("rows"), data.get("notes", [])
    if not isinstance(rows, list) or not rows or not isinstance(notes, list):
        raise SpecError(f"{where} has no [[rows]]", hint="the first row is the baseline")
    return Experiment(
        name=table.text("name"),
        source=table.text("source"),
        request=request,
        capacity=table.number("capacity", most=1.0),
        published_s=(table.number("published_prefill_s"), table.number("published_decode_s")),
        rows=tuple(_row(Fields(row, f"{where} rows[{i}]", _LIKE)) for i, row in enumerate(rows)),
        what_if=_what_if(table, request.hardware),
        notes=tuple(str(note) for note in notes),
    )


def run_experiment(experiment: Experiment, hardware: HardwareSpec | None = None) -> list[Outcome]:
    """Simulate every row on the same routing, on the experiment's machine or another."""
    request = replace(experiment.request, hardware=hardware or experiment.request.hardware)
    slots = round(experiment.capacity * request.model.experts.count)
    placed = replace(request.fit(), slots=(slots,) * request.model.moe_layers)
    routing = request.routing()
    outcomes: list[Outcome] = []
    for row in experiment.rows:
        run = row.rule.run(request, placed, routing)
        first = outcomes[0] if outcomes else None
        outcomes.append(
            Outcome(
                row.rule.name,
                run.ttft_s,
                run.tpot_s,
                run.hit_rate,
                first.prefill_s / run.ttft_s if first else 1.0,
                first.decode_s / run.tpot_s if first else 1.0,
                *row.published,
            )
        )
    return outcomes


def experiment_tables(
    experiment: Experiment, outcomes: list[Outcome], other: list[Outcome]
) -> list[Table]:
    """Return ours beside the published figures, the same for the what-if machine, and notes."""
    request = experiment.request
    asked = (
        ("experiment", f"{experiment.name}: {experiment.source}"),
        ("model", f"{request.model.name}, experts {request.experts}, dense {request.dense}"),
        ("hardware", f"{request.hardware.name}: {request.hardware.summary}"),
        (
            "request",
            f"prompt {request.prompt}, {request.tokens} decoded, "
            f"slots for {experiment.capacity:.0%} of the experts, synthetic routing (assumed)",
        ),
    )
    found = [
        Table("Experiment", ("", ""), asked, prose=True),
        _ratios("Times as fast as the first row", outcomes),
        _seconds("The first row in seconds", outcomes[0], experiment.published_s),
    ]
    if experiment.what_if:
        reason = f"What if: {experiment.what_if[0]}"
        found.append(_ratios(reason, other))
        found.append(_seconds("The first row then, in seconds", other[0], experiment.published_s))
    notes = tuple((note,) for note in experiment.notes)
    return [*found, Table("Notes", ("",), notes, prose=True)]


def _ratios(title: str, outcomes: list[Outcome]) -> Table:
    rows = []
    for ours in outcomes:
        pairs = (
            (ours.prefill_speedup, ours.published_prefill),
            (ours.decode_speedup, ours.published_decode),
        )
        far = any(p is not None and abs(o / p - 1) > FAR for o, p in pairs)
        cells = [cell for o, p in pairs for cell in (f"{o:.2f}", "-" if p is None else f"{p:.2f}")]
        rows.append((ours.name, *cells, f"{ours.hit_rate:.1%}", "see notes" if far else ""))
    columns = ("", "prefill", "published", "decode", "published", "hit rate", "over 20% apart")
    return Table(title, columns, tuple(rows))


def _seconds(title: str, first: Outcome, published: tuple[float, float]) -> Table:
    rows = (
        ("prefill", f"{first.prefill_s:.3f}", f"{published[0]:.3f}"),
        ("decode step", f"{first.decode_s:.3f}", f"{published[1]:.3f}"),
    )
    return Table(title, ("", "ours", "published"), rows)


def experiment_dict(
    experiment: Experiment, outcomes: list[Outcome], other: list[Outcome]
) -> dict[str, Any]:
    """Return the experiment as plain values."""
    return {
        "schema": SCHEMA,
        "name": experiment.name,
        "source": experiment.source,
        "model": experiment.request.model.name,
        "hardware": experiment.request.hardware.name,
        "capacity": experiment.capacity,
        "published_s": list(experiment.published_s),
        "rows": [asdict(outcome) for outcome in outcomes],
        "what_if": experiment.what_if
        and {"reason": experiment.what_if[0], "rows": [asdict(outcome) for outcome in other]},
        "notes": list(experiment.notes),
    }


_FIXED = "fixed"
"""A set nobody chose by use, which never changes: how a static mapping starts and ends."""


def _row(entry: Fields) -> Row:
    """Read one configuration."""
    entry.only(_ROW)
    scheduler = _SCHEDULERS[_one_of(entry, "schedule", _SCHEDULERS)]
    cache = _one_of(entry, "cache", (_FIXED, *policies.names()))
    kept = StaticPopularity.name if cache == _FIXED else cache
    rule = Rule(
        entry.text("name"),
        "",
        scheduler,
        lambda request, routing: policies.policy(
            kept, request.model.moe_layers, request.model.experts.count
        ),
        entry.flag("prefetch"),
        entry.flag("refill"),
    )
    published = [entry.number(n) if entry.has(n) else None for n in ("prefill", "decode")]
    return Row(rule, (published[0], published[1]))


def _what_if(table: Fields, hardware: HardwareSpec) -> tuple[str, HardwareSpec] | None:
    """Read the machine that an experiment's explanation supposes."""
    if not table.has("what_if"):
        return None
    entry = table.table("what_if")
    entry.only(("reason", "cpu_memory_bytes_per_s"))
    rate = entry.number("cpu_memory_bytes_per_s")
    return entry.text("reason"), hardware.with_values("cpu", memory_bytes_per_s=rate)


def _one_of(entry: Fields, name: str, known: Collection[str]) -> str:
    value = entry.text(name)
    if value not in known:
        raise SpecError(
            f"{entry.where}: {name} is {value!r}", hint=f"use one of {', '.join(known)}"
        )
    return value
