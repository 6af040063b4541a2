"""Compares two plans, read from the JSON that reports are written as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.decide.policies import DEFAULT_POLICY
from planner.describe.checked_table import read_table
from planner.errors import SpecError
from planner.foretell.report import SCHEMA, Table

GIB = 2**30


_AGAIN = "write it with hybrid plan MODEL --json"


def read_plan(path: Path) -> dict[str, Any]:
    """Read a report written as JSON.

    Raises
    ------
    SpecError
        When the file is damaged or no plan of this schema.
    """
    data = read_table(path)
    if data.get("schema") != SCHEMA:
        raise SpecError(
            f"{path} has schema {data.get('schema')!r}, not {SCHEMA!r}",
            hint=_AGAIN,
        )
    try:
        compare(data, data)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SpecError(
            f"{path} is no whole plan ({type(error).__name__}: {error})", hint=_AGAIN
        ) from error
    return data


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Table]:
    """Return what differs between two plans, asked and predicted."""
    return [
        table
        for table in (_asked(first, second), _predicted(first, second), _memory(first, second))
        if table.rows
    ]


def _asked(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """What the two were asked for, where it differs."""
    sides = []
    for plan in (first, second):
        names = {"model": plan["model"]["name"], "hardware": plan["hardware"]["name"]}
        memory = {
            "VRAM GiB": f"{plan['fit']['vram_bytes'] / GIB:.2f}",
            "RAM GiB": f"{plan['fit']['ram_bytes'] / GIB:.2f}",
        }
        # Plans of before there was a choice do not name their policy.
        asked = {"policy": DEFAULT_POLICY, **plan["request"]}
        sides.append({**names, **{k: str(v) for k, v in asked.items()}, **memory})
    rows = [(k, a, sides[1].get(k, "")) for k, a in sides[0].items() if a != sides[1].get(k)]
    return Table("What differs", ("", "A", "B"), tuple(rows))


def _predicted(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """The predictions, or which of the two does not fit."""
    plans = (first, second)
    unfit = [plan["fit"]["shortage"] for plan in plans]
    if any(unfit):
        words = [f"does not fit: {shortage}" if shortage else "fits" for shortage in unfit]
        return Table("Verdict", ("", "A", "B"), (("", *words),), prose=True)
    rows = [
        _row("first token", [plan["ttft"]["value_s"] * 1e3 for plan in plans]),
        _row("token", [plan["tpot"]["value_s"] * 1e3 for plan in plans]),
    ]
    for term in first["terms"]:
        values = [plan["terms"].get(term, {"value_s": 0.0})["value_s"] * 1e3 for plan in plans]
        if any(values):
            rows.append(_row(f"token: {term}", values))
    rates = [plan["hit_rate"] for plan in plans]
    rows.append(("hit rate", *(f"{rate:.1%}" for rate in rates), f"{rates[1] - rates[0]:+.1%}"))
    return Table("Prediction", ("", "A ms", "B ms", "change"), tuple(rows))


def _memory(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """Everything that takes memory, where it differs."""
    sides = [
        {
            f"{item['place']}: {item['name'].split(' (')[0]}": item["bytes"]
            for item in plan["fit"]["items"]
        }
        for plan in (first, second)
    ]
    rows = []
    for name in {**sides[0], **sides[1]}:
        a, b = (side.get(name, 0) / GIB for side in sides)
        if round(a, 2) != round(b, 2):
            rows.append((name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"))
    return Table("Memory", ("", "A GiB", "B GiB", "change GiB"), tuple(rows))


def _row(name: str, values: list[float]) -> tuple[str, ...]:
    change = f"{values[1] / values[0] - 1:+.1%}" if values[0] else "new"
    return (name, *(f"{value:.2f}" for value in values), change)
