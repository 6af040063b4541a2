"""``hybrid remove``: takes models out of the cache. Loads neither torch nor transformers."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hybrid.errors import UsageError
from hybrid.hub.kept import Downloaded, downloaded, remove_download
from hybrid.hub.names import hub_name
from hybrid.weights.copies import KeptCopy, kept_copies, remove_copy
from planner.describe.words import in_words


def remove(
    names: Annotated[
        list[str],
        typer.Argument(help="Copies as 'hybrid list' shows them, models, or names of the hub."),
    ],
    download: Annotated[
        bool, typer.Option("--download", help="Also what was downloaded of the hub.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also copies that cannot be made again from here.")
    ] = False,
) -> None:
    """Remove converted copies from the cache; the models that they were made of stay.

    A copy whose model is no longer there is removed with --yes only.
    """
    kept = kept_copies()
    chosen = {name: _named(name, kept) for name in names}
    there = downloaded() if download else []
    loads = {name: [each for each in there if each.repo == _repo(name)] for name in names}
    for name in names:
        if not chosen[name] and not loads[name]:
            known = ", ".join(dict.fromkeys(copy.path.name for copy in kept)) or "none"
            raise UsageError(
                f"{name!r} is no copy in the cache", hint=f"there are: {known} ('hybrid list')"
            )
    copies = list(dict.fromkeys(copy for name in names for copy in chosen[name]))
    last = [copy for copy in copies if copy.whole and not copy.can_be_made_again]
    if last and not yes:
        raise UsageError(
            f"{last[0].path.name} cannot be made again: {last[0].source or 'its model'} is no "
            "longer there",
            hint="--yes removes it all the same",
        )
    for copy in copies:
        remove_copy(copy.path)
        _say(f"removed {copy.path.name}, {in_words(copy.nbytes)}")
    for each in dict.fromkeys(each for name in names for each in loads[name]):
        _remove_download(each)


def _named(name: str, kept: list[KeptCopy]) -> list[KeptCopy]:
    """Return the copies that a name stands for."""
    return [copy for copy in kept if name in (copy.path.name, copy.name, copy.called, copy.source)]


def _repo(name: str) -> str | None:
    published = hub_name(name)
    return None if published is None else published.repo


def _remove_download(each: Downloaded) -> None:
    remove_download(each)
    _say(f"removed the download of {each.repo}, {in_words(each.nbytes)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
