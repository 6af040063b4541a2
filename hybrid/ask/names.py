"""Models and machines by the names that users give them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import UsageError
from planner.describe.checked_table import nearest, parse_table, read_table
from planner.describe.families import from_hf_config, from_table
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec

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
    known = {path.stem: path for path in _shipped(kind)}
    wanted = _plain(name.rsplit("/", 1)[-1])
    exact = [stem for stem in known if _plain(stem) == wanted]
    beginning = [stem for stem in known if _plain(stem).startswith(wanted)]
    found = exact or beginning or [stem for stem in known if wanted in _plain(stem)]
    if len(found) == 1:
        return parse_table(known[found[0]].read_text("utf-8"), f"{found[0]}.toml")
    word = kind.removesuffix("s")
    if found:
        raise UsageError(f"{word} {name!r} could be {_listing(found)}", hint="write one of them")
    near = nearest(name.rsplit("/", 1)[-1], known)
    where = " or give a path to a config.json" if kind == "models" else " or give a path to a file"
    raise UsageError(
        f"unknown {word} {name!r}",
        hint=(f"did you mean {near}? " if near else "") + f"known: {_listing(known)};{where}",
    )


def find_model(name: str | Path) -> ModelSpec:
    """Describe a model: a shipped name, a ``config.json``, its directory, or a TOML file."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        data = read_table(path, "model description")
        if path.suffix == ".toml":
            return from_table(data, path.name)
        called = path.parent.resolve().name if path.name == "config.json" else path.stem
        return from_hf_config(data, data.get("_name_or_path") or called)
    if path.suffix in (".json", ".toml"):
        raise UsageError(f"there is no file {name}", hint="check the path")
    data = resolve(str(name), "models")
    return from_table(data, str(name))


def stored_weights(model: str | Path | ModelSpec) -> str | None:
    """Return the digest of the checkpoint a converted directory was made from; None without one.

    Raises
    ------
    SpecError
        When the directory's index is damaged.
    """
    index = None if isinstance(model, ModelSpec) else Path(model) / "experts.json"
    if index is None or not index.is_file():
        return None
    source = read_table(index).get("source")
    return source.get("identity") if isinstance(source, dict) else None


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
