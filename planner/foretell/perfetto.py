"""Writes a run as Chrome trace events, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterable

from planner.foretell.dryrun import PlanResult
from planner.foretell.run import Event

LANES = ("cpu", "gpu", "link", "disk", "cache")
"""Threads of the trace, in the order they are shown."""


def to_perfetto(result: PlanResult) -> str:
    """Return the recorded part of a dry run, the prompt and the first tokens, as JSON.

    A model that does not fit leaves the lanes empty.
    """
    title = f"{result.request.model.name} on {result.request.hardware.name}"
    return trace_events(title, result.prediction.run.events if result.prediction else ())


def trace_events(title: str, events: Iterable[Event], lanes: Iterable[str] = LANES) -> str:
    """Return ``events``, all of ``lanes``, as JSON under one process called ``title``.

    Notes
    -----
    The format's timestamps are microseconds; "X" is a span, "i" an instant (what the cache does
    takes no time), "M" metadata.
    """
    thread = {lane: number for number, lane in enumerate(lanes, start=1)}
    rows: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}
    ]
    for lane, number in thread.items():
        rows.append(
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}}
        )
        rows.append(
            {
                "ph": "M",
                "pid": 1,
                "tid": number,
                "name": "thread_sort_index",
                "args": {"sort_index": number},
            }
        )
    for event in events:
        row: dict[str, object] = {
            "pid": 1,
            "tid": thread[event.lane],
            "name": event.name,
            "cat": event.lane,
            "ts": round(event.start_s * 1e6, 3),
        }
        if event.lane == "cache":
            row |= {"ph": "i", "s": "t"}
        else:
            row |= {"ph": "X", "dur": round((event.end_s - event.start_s) * 1e6, 3)}
        if event.predicted_s is not None:
            row["args"] = {"predicted ms": round(event.predicted_s * 1e3, 6)}
        rows.append(row)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": rows}, separators=(",", ":"))
