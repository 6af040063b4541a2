"""Reads untrusted tables (a config.json, a TOML file) one checked field at a time."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import SpecError

LARGEST = 10**12
"""No count in a model or machine description is larger; a larger one is a slip."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the member of ``known`` that ``name`` was probably meant to be."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    return by_lower[found[0]] if found else None


def read_table(path: Path, what: str | None = None) -> dict[str, Any]:
    """Read a JSON or TOML file whose top level is a table.

    Parameters
    ----------
    path
        The file.
    what
        What it was taken for by someone who may have named any file.

    Raises
    ------
    SpecError
        When the file cannot be read, is damaged, or holds something else than a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise _unfit(str(path), what, error) from error
    return parse_table(text, str(path), what)


def parse_table(text: str, where: str, what: str | None = None) -> dict[str, Any]:
    """Parse JSON, or TOML where the name says so, whose top level is a table.

    Raises
    ------
    SpecError
        When it is damaged, cut short, or something else than a table.
    """
    try:
        data = tomllib.loads(text) if where.endswith(".toml") else json.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _unfit(where, what, error) from error
    if not isinstance(data, dict):
        raise SpecError(
            f"{where} holds a {type(data).__name__}, not a table", hint="expected key-value pairs"
        )
    return data


def _unfit(where: str, what: str | None, error: Exception) -> SpecError:
    """Say that a file is damaged; or what it is not, unless its name says that it is a table."""
    if what is None or where.endswith((".json", ".toml")):
        return SpecError(
            f"{where} is damaged or cut short: {error}", hint="write or download the file again"
        )
    return SpecError(f"{where} is no {what}", hint="name a .toml or .json file that is one")


def _short(values: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, values[:4]))
    return f"[{shown}, ...] ({len(values)} entries)" if len(values) > 4 else f"[{shown}]"


class Fields:
    """A table whose fields are looked up under any of several names, and checked.

    Parameters
    ----------
    data
        The table.
    where
        How messages name it, for example ``config.json of Mixtral-8x7B``.
    like
        What to compare it with where something is wrong.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        where: str,
        like: str = "the publisher's own, complete config.json",
    ) -> None:
        self.data = data
        self.where = where
        self.like = like
        self.read: set[str] = set()

    def with_data(self, data: Mapping[str, Any]) -> Fields:
        """Return the same table with other fields; what is read of either is noted in both."""
        other = Fields(data, self.where, self.like)
        other.read = self.read
        return other

    def get(self, name: str) -> Any:
        """Return a field as it is; None when absent."""
        self.read.add(name)
        return self.data.get(name)

    def has(self, *names: str) -> bool:
        """Whether any of ``names`` is present and not null."""
        self.read.update(names)
        return any(self.data.get(name) is not None for name in names)

    def first(self, *names: str) -> tuple[str, Any]:
        """Return the first of ``names`` that is present and not null, with its value."""
        self.read.update(names)
        for name in names:
            if self.data.get(name) is not None:
                return name, self.data[name]
        wanted = names[0] if len(names) == 1 else f"{names[0]} (or {', '.join(names[1:])})"
        raise SpecError(f"{self.where} lacks {wanted}", hint=f"compare with {self.like}")

    def count(
        self, *names: str, default: int | None = None, least: int = 1, most: int = LARGEST
    ) -> int:
        """Return a whole number in ``[least, most]``; a list must repeat one."""
        if default is not None and not self.has(*names):
            return default
        name, value = self.first(*names)
        if isinstance(value, list | tuple) and value:
            if any(item != value[0] for item in value):
                raise SpecError(
                    f"{self.where}: {name} is {_short(value)}, where one number is expected",
                    hint=f"{name} may differ from layer to layer if it has an entry for each",
                )
            value = value[0]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value != int(value):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not a whole number",
                hint=f"{name} must be an integer of at least {least}",
            )
        if not least <= value <= most:
            raise SpecError(
                f"{self.where}: {name} is {value:g}, outside [{least}, {most:g}]",
                hint=f"compare with {self.like}",
            )
        return int(value)

    def number(self, name: str, *, least: float = 0.0, most: float = math.inf) -> float:
        """Return a finite number in ``[least, most]``."""
        _, value = self.first(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not a number",
                hint="write a plain number in SI units, without a unit in quotes",
            )
        if not (math.isfinite(value) and least <= value <= most):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, outside [{least:g}, {most:g}]",
                hint="check the number and its unit",
            )
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """Return a non-empty string."""
        if default is not None and not self.has(name):
            return default
        _, value = self.first(name)
        if not isinstance(value, str) or not value:
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not a text", hint=f"put {name} in quotes"
            )
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not true or false",
                hint=f"{name} must be a boolean",
            )
        return value

    def names(self, *fields: str, length: int) -> list[str] | None:
        """Return a list of one word per layer, or None when absent."""
        for field in fields:
            value = self.get(field)
            if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                if len(value) < length:
                    raise SpecError(
                        f"{self.where}: {field} has {len(value)} entries for {length} layers",
                        hint="the list needs one entry per layer",
                    )
                return value[:length]
        return None

    def one_each(self, name: str, length: int) -> list[int]:
        """Return a list of a whole number per layer."""
        found = self.numbers(name) or []
        if len(found) < length:
            raise SpecError(
                f"{self.where}: {name} has {len(found)} entries for {length} layers",
                hint="the list needs one entry per layer",
            )
        return found[:length]

    def numbers(self, name: str) -> list[int] | None:
        """Return a list of whole numbers, or None when absent."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, str):  # Step-3 writes them as one text
            value = [int(part) if part.strip().isdigit() else part for part in value.split(",")]
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not a list of whole numbers",
                hint=f"compare {name} with {self.like}",
            )
        return value

    def table(self, name: str) -> Fields:
        """Return a nested table."""
        _, value = self.first(name)
        if not isinstance(value, Mapping):
            raise SpecError(
                f"{self.where}: {name} is {value!r}, not a table", hint=f"write it as [{name}]"
            )
        return Fields(value, f"{self.where} [{name}]", self.like)

    def only(self, known: Iterable[str]) -> None:
        """Refuse fields that are not in ``known``, naming what was probably meant."""
        known = list(known)
        for name in self.data:
            if name not in known:
                meant = nearest(name, known)
                raise SpecError(
                    f"{self.where}: unknown field {name!r}",
                    hint=f"did you mean {meant!r}?" if meant else f"known: {', '.join(known)}",
                )
