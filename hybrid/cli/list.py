"""``hybrid list``: the models in the cache. Loads neither torch nor transformers."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from hybrid.hub.kept import Downloaded, downloaded
from hybrid.weights.copies import KeptCopy, formats_of, kept_copies
from planner.describe.words import in_words

_HEAD = ("copy", "size", "experts", "dense", "last used", "made of")


def list_models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; sizes in bytes.")
    ] = False,
) -> None:
    """List the converted copies in the cache, and what was downloaded of the hub.

    What was converted to a folder of your own is not among them.
    """
    copies, downloads = kept_copies(), downloaded()
    if as_json:
        found = {
            "copies": [
                {
                    "name": copy.path.name,
                    **{k: str(v) if k == "path" else v for k, v in asdict(copy).items()},
                    "can_be_made_again": copy.can_be_made_again,
                    "kept_as": None if (kept := formats_of(copy)) is None else asdict(kept),
                }
                for copy in copies
            ],
            "downloads": [asdict(each) | {"path": str(each.path)} for each in downloads],
        }
        print(json.dumps(found, indent=2))
        return
    if copies:
        _print([_HEAD, *map(_row, copies)])
    if downloads:
        print("\ndownloads" if copies else "downloads")
        _print([_downloaded(each) for each in downloads])
    if not copies and not downloads:
        print("no models: 'hybrid run MODEL' converts one and keeps it")


def _row(copy: KeptCopy) -> tuple[str, ...]:
    gone = "" if copy.can_be_made_again else " (no longer there)"
    kept = formats_of(copy)
    if kept is None:  # what was asked for
        experts, dense = copy.experts or "as the model", copy.dense or "as the model"
    else:
        experts = ", ".join(kept.experts) or "none"
        dense = ", ".join(kept.dense) or "as the model"
    return (
        copy.path.name if copy.whole else f"{copy.path.name} (not finished)",
        in_words(copy.nbytes),
        experts,
        dense,
        _when(copy.used_s),
        f"{copy.called or 'unknown'}{gone}",
    )


def _downloaded(each: Downloaded) -> tuple[str, ...]:
    return each.repo, in_words(each.nbytes), _when(each.used_s), str(each.path)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
