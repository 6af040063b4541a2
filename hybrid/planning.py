"""What users name and measure things by: models, machines and sizes."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import UsageError
from planner.families import from_hf_config, from_table
from planner.fields import nearest, parse_table, read_table
from planner.hardware import HardwareSpec
from planner.model import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "m": 2**20,
    "mib": 2**20,
    "g": 2**30,
    "gib": 2**30,
    "t": 2**40,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
"""A bare letter is binary, as in llama.cpp and docker; ``GB`` is decimal, ``GiB`` binary."""


def parse_bytes(text: str, option: str, *, zero: bool = False) -> int:
    """Return a size such as ``6GiB``, ``6G``, ``1.5e9`` in bytes; 0 only where ``zero`` allows it.

    Raises
    ------
    UsageError
        When it is not a number with a unit, not above 0, or more than there is anywhere.
    """
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bikmgt")
    try:
        value = float(number) * UNITS[compact[len(number) :]]
    except (KeyError, ValueError):
        value = nan
    if not isfinite(value):
        raise UsageError(
            f"{option} {text!r} is not a size", hint=f"for example {option} 6GiB or {option} 6000MB"
        )
    if value >= 2**60:
        raise UsageError(
            f"{option} {text!r} is {value / 2**40:.3g} TiB, more than any machine has",
            hint=f"for example {option} 6GiB; without a unit it is bytes",
        )
    if 0 < value < 1:
        raise UsageError(
            f"{option} {text!r} is less than one byte", hint=f"add a unit: {option} {number}GiB"
        )
    if value < 0 and zero:
        raise UsageError(f"{option} {text!r} is below 0", hint=f"{option} 0 is the CPU alone")
    if value <= 0 and not zero:
        raise UsageError(
            f"{option} {text!r} is not above 0",
            hint="for a machine without a GPU: --hardware cpu-only-laptop"
            if option == "--vram"
            else "give the memory the machine has",
        )
    return int(value)


def size_in_bytes(size: str | int | None, option: str) -> int | None:
    """Return a size given as bytes or as a text such as ``"4GiB"``; None is whatever there is.

    Raises
    ------
    UsageError
        When it is no size; only vram can be 0.
    """
    if size is None or str(size).strip().lower() == "auto":
        return None
    return parse_bytes(str(size), option, zero=option.endswith("vram"))


def resolve(name: str, kind: str) -> dict[str, Any]:
    """Read the shipped description called ``name``, or uniquely beginning or containing it.

    Parameters
    ----------
    name
        As the user typed it; case, a publisher before a slash and punctuation do not matter.
    kind
        ``models`` or ``hardware``.

    Raises
    ------
    UsageError
        When nothing or more than one thing is meant; the hint names the nearest.
    """
    known = {entry.name.removesuffix(".toml"): entry for entry in _shipped(kind)}
    wanted = _plain(name.rsplit("/", 1)[-1])
    exact = [stem for stem in known if _plain(stem) == wanted]
    beginning = [stem for stem in known if _plain(stem).startswith(wanted)]
    found = exact or beginning or [stem for stem in known if wanted in _plain(stem)]
    if len(found) == 1:
        return parse_table(known[found[0]].read_text("utf-8"), f"{found[0]}.toml")
    word = "model" if kind == "models" else "hardware"
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
        data = read_table(path)
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
        return HardwareSpec.from_table(read_table(path), path.name)
    if path.suffix in (".json", ".toml"):
        raise UsageError(f"there is no file {name}", hint="check the path")
    return HardwareSpec.from_table(resolve(str(name), "hardware"), str(name))


def shipped_names(kind: str) -> list[str]:
    """Return the names of the shipped ``models``, ``hardware`` or ``experiments``."""
    return [entry.name.removesuffix(".toml") for entry in _shipped(kind)]


def _shipped(kind: str) -> list[Traversable]:
    try:
        folder = files("hybrid.configs") / kind
    except ModuleNotFoundError:  # imported from a source tree, where nothing maps the folder
        folder = Path(__file__).parents[1] / "configs" / kind
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    return sorted(entries, key=lambda entry: entry.name)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
