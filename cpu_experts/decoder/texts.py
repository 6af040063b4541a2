"""Says which tokens of a step are of which text, and where that text's keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_experts.decoder.records import TEXT
from hybrid.formats.errors import ShapeError

#: A text's beginning where nothing lies in front of it.
_NOWHERE = -(1 << 40)


class Texts(NamedTuple):
    """The texts of a step.

    Attributes
    ----------
    records
        A :data:`~cpu_experts.decoder.records.TEXT` of each.
    owners
        For every token which of them it is of.
    """

    records: Any
    owners: NDArray[np.int64]


def alike(count: int, texts: int, begins: NDArray[np.int64] | None) -> Texts:
    """Return texts of as many tokens, ``count`` in all, whose heads lie in one cache.

    ``begins`` ``[texts]`` is where each begins, relative to its next position; everywhere unless
    given.

    Raises
    ------
    ShapeError
        When there is no token, or not as many of each, or ``begins`` is of another shape.
    """
    if begins is None:
        begins = np.full(texts, _NOWHERE, np.int64)
    if not count or count % texts or begins.shape != (texts,) or begins.dtype != np.int64:
        raise ShapeError(
            f"{count} tokens of {texts} texts that begin at {begins.dtype}"
            f" {list(begins.shape)}; that is as many of each, from int64 [{texts}] on"
        )
    tokens, records = count // texts, np.zeros(texts, TEXT)
    records["first"] = np.arange(texts) * tokens
    records["tokens"], records["place"], records["begins"] = tokens, np.arange(texts), begins
    return Texts(records, np.arange(count) // tokens)


def apart(rows: Sequence[int], counts: Sequence[int]) -> Texts:
    """Return texts of ``counts`` tokens, each with a row of states to itself.

    Raises
    ------
    ShapeError
        When one has no token, or a row comes twice.
    """
    if len(rows) != len(counts) or not counts or min(counts) < 1 or len({*rows}) != len(rows):
        raise ShapeError(
            f"rows {list(rows)} have {list(counts)} tokens; each comes once, with one or more"
        )
    records = np.zeros(len(rows), TEXT)
    records["tokens"], records["row"], records["begins"] = counts, rows, _NOWHERE
    records["first"][1:] = np.cumsum(counts)[:-1]
    return Texts(records, np.repeat(np.arange(len(rows)), counts))
