"""What ships with this program, and machines, by the names that users give them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import UsageError
from hybrid.hub.names import repo_of
from planner.describe.checked_table import nearest, parse_table, read_table
from planner.describe.hardware import HardwareSpec
from planner.describe.routing_law import PublishedLaw, read_laws

if TYPE_CHECKING:
    from collections.abc import Iterable


def resolve(name: str, kind: str) -> dict[str, Any]:
    """Read the shipped description called ``name``, or uniquely beginning or containing it.

    Parameters
    ----------
    name
        As the user typed it; case, a publisher before a slash and punctuation do not matter.
    kind
        ``models``, ``hardware`` or ``experiments``.

    Raises
    ------
    UsageError
        When nothing or more than one thing is meant; the hint names the nearest.
    """
    shipped = {path.stem: path for path in _shipped(kind)}
    typed = _plain(name.rsplit("/", 1)[-1] if kind == "models" else name)
    exact = [stem for stem in shipped if _plain(stem) == typed]
    beginning = [stem for stem in shipped if _plain(stem).startswith(typed)]
    matches = exact or beginning or [stem for stem in shipped if typed in _plain(stem)]
    if not typed:  # which every name begins with
        matches = []
    if len(matches) == 1:
        return parse_table(shipped[matches[0]].read_text("utf-8"), f"{matches[0]}.toml")
    word = kind.removesuffix("s")
    if matches:
        raise UsageError(f"{word} {name!r} could be {_listing(matches)}", hint="write one of them")
    near = nearest(name.rsplit("/", 1)[-1], shipped)
    where = " or give a path to a config.json" if kind == "models" else " or give a path to a file"
    raise UsageError(
        f"unknown {word} {name!r}",
        hint=(f"did you mean {near}? " if near else "") + f"known: {_listing(shipped)};{where}",
    )


def directory_name(directory: Path) -> str:
    """Return what the model in a directory is called: the hub's cache calls it by a hash."""
    folder = directory.resolve()
    repo = repo_of(folder) if folder.parent.name == "snapshots" else None
    return folder.name if repo is None else repo.rpartition("/")[2]


def find_hardware(name: str | Path) -> HardwareSpec:
    """Describe a machine: a shipped name, or a TOML file."""
    path = Path(name)
    if path.is_file():
        return HardwareSpec.from_table(read_table(path, "hardware description"), path.name)
    if path.suffix in (".json", ".toml"):
        raise UsageError(f"there is no file {name}", hint="check the path")
    return HardwareSpec.from_table(resolve(str(name), "hardware"), str(name))


def shipped_names(kind: str) -> list[str]:
    """Return the names of the shipped ``models``, ``hardware`` or ``experiments``."""
    return [path.stem for path in _shipped(kind)]


@cache
def routing_laws() -> tuple[PublishedLaw, ...]:
    """Return what is known of routers' habits, by family."""
    return read_laws(read_table(configs() / "routing.toml"), "routing.toml")


def configs() -> Path:
    """Return the folder of what ships: models, hardware and experiments.

    An installed copy has it inside the package, a checkout beside it. It is looked for there, not
    imported: nothing maps it in a checkout, and there it could be that of another, installed copy.
    """
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _shipped(kind: str) -> list[Path]:
    return sorted((configs() / kind).glob("*.toml"))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
