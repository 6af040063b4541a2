"""Which versions of the libraries below us the tests passed on, and which of those here are not.

The ranges are those that the package itself requires, so that there is one list: pip installs
nothing else unless it is forced to. Loads none of the libraries.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_DISTRIBUTION = "hybrid-moe"
#: Libraries whose insides we use, or whose results we compare with.
CHECKED = ("torch", "transformers", "tokenizers", "numba")


@dataclass(frozen=True)
class Untested:
    """A library of a version that the tests were not run on.

    Attributes
    ----------
    package, version
        What is installed.
    tested
        The range that was, such as ``">=5.23,<5.25"``.
    """

    package: str
    version: str
    tested: str

    def __str__(self) -> str:
        return f"{self.package} {self.version} was not tested ({self.tested} was)"

    @property
    def remedy(self) -> str:
        """The command that brings a version that was tested."""
        return f'pip install "{self.package}{self.tested}"'


def untested() -> tuple[Untested, ...]:
    """Return the libraries installed here of which another version was tested."""
    found = []
    for requirement in map(Requirement, _requirements()):
        if requirement.name in CHECKED:
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                tested = ",".join(sorted(map(str, requirement.specifier), reverse=True))
                found.append(Untested(requirement.name, version, tested))
    return tuple(found)


@cache
def _requirements() -> tuple[str, ...]:
    """What this package requires: as its sources say where it runs from them, else as installed."""
    sources = Path(__file__).parents[2] / "pyproject.toml"
    if sources.is_file():
        project = tomllib.loads(sources.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == _DISTRIBUTION:
            return tuple(project["dependencies"])
    try:
        return tuple(_without_extras(metadata.requires(_DISTRIBUTION) or ()))
    except metadata.PackageNotFoundError:  # a copied folder, which says nothing of itself
        return ()


def _without_extras(requirements: Iterable[str]) -> Iterable[str]:
    return (text for text in requirements if "extra ==" not in text)
