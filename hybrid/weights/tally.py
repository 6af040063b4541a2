"""Counts what became of quantized weights: kept as they are, or changed, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hybrid.formats.errors import FormatError
from hybrid.formats.strips import F32


@dataclass
class _Changed:
    """Weights that are not what they were, and the squares of their errors and of themselves."""

    weights: int = 0
    errors: float = 0.0
    squares: float = 0.0


@dataclass
class Tally:
    """What became of the weights of a checkpoint that somebody quantized.

    Attributes
    ----------
    watched
        Formats that were chosen for them; of others, which somebody asked for, nothing is counted.
    kept
        Weights that are exactly what they were.
    exact
        Whether to refuse weights that cannot stay what they were.
    """

    watched: set[str] = field(default_factory=set)
    kept: int = 0
    exact: bool = False
    _changed: dict[str, _Changed] = field(default_factory=dict)

    def keep(self, fmt: str, weights: int) -> None:
        """Count weights that are what they were."""
        if fmt in self.watched:
            self.kept += weights

    def change(self, fmt: str, were: F32, are: F32) -> None:
        """Count weights that are something else.

        Raises
        ------
        FormatError
            When they have to be what they were, and are not.
        """
        if self.exact and not np.array_equal(were, are):
            raise FormatError(
                f"{int((were != are).sum())} of {were.size} weights are something else in {fmt}, "
                "and --exact keeps what was published",
                hint="leave out --exact: the error is said when it is done",
            )
        found = self._changed.setdefault(fmt, _Changed())
        error = (are - were).astype(np.float64)
        found.weights += were.size
        found.errors += float(np.vdot(error, error))
        found.squares += float(np.vdot(were, were))

    def notes(self) -> Iterator[str]:
        """Say in a line for each format how many weights were changed, and by how much."""
        total = self.kept + sum(found.weights for found in self._changed.values())
        for fmt, found in self._changed.items():
            error = math.sqrt(found.errors / found.squares) if found.squares else 0.0
            yield (
                f"{100 * found.weights / total:.3g} % of the quantized weights are not exactly "
                f"what was published: in {fmt} they differ by {100 * error:.2g} % "
                "(root mean square)"
            )
