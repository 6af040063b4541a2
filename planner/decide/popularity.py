"""Which experts a model has used, kept from one session to the next, and a cache that starts so.

A popularity file is JSON: ``{"schema": "hybrid.popularity/1", "model": name, "identity": digest,
"tokens": T, "uses": [[...], ...]}`` with the uses of every expert of every MoE layer, and a digest
of the weights that were used, which is the same wherever they lie. A cache opened with it holds
the most used experts from the first token on, in slots shared among the layers by what they are
worth there, and its policy knows them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.decide.capacity import marginal_capacities
from planner.describe.checked_table import LARGEST, read_table
from planner.describe.traces import read_trace
from planner.errors import TraceError

SCHEMA = "hybrid.popularity/1"
_HINT = "write it with a session of this version, or leave it out"


@dataclass(frozen=True, eq=False)
class Popularity:
    """How often each expert was used.

    Parameters
    ----------
    model
        Name, for messages.
    tokens
        How many tokens were counted.
    uses
        ``[L, E]``.
    identity
        A digest of the model's weights; None where that is not known, as of a trace.
    """

    model: str
    tokens: int
    uses: NDArray[np.int64]
    identity: str | None = None

    @classmethod
    def of_trace(cls, path: Path, model: str, experts: int) -> Popularity:
        """Count a routing trace's choices.

        Raises
        ------
        TraceError
            When the file is damaged or names experts the model does not have.
        """
        ids, _ = read_trace(path)
        if ids.max(initial=0) >= experts or ids.min(initial=0) < 0:
            raise TraceError(
                f"{path} names expert {int(ids.max())}, {model} has experts 0 to {experts - 1}",
                hint="use a trace recorded with this model",
            )
        uses = np.stack(
            [np.bincount(layer.ravel(), minlength=experts) for layer in ids.swapaxes(0, 1)]
        )
        return cls(model, len(ids), uses)

    def check(self, layers: int, experts: int, where: str) -> None:
        """Raise unless the counts are of a model of this shape.

        Raises
        ------
        TraceError
            Naming both shapes.
        """
        if self.uses.shape != (layers, experts):
            raise TraceError(
                f"{where} counts {list(self.uses.shape)} experts of {self.model}, the model has "
                f"{[layers, experts]}",
                hint="use a popularity file written with this model",
            )

    def check_weights(self, identity: str, model: str, where: str) -> None:
        """Raise unless the counts are of the weights called ``identity``, or may be.

        Raises
        ------
        TraceError
            Naming both models.
        """
        if self.identity not in (None, identity):
            raise TraceError(
                f"{where} counts experts of {self.model} (weights {str(self.identity)[:8]}), "
                f"the model is {model} (weights {identity[:8]})",
                hint="use a popularity file written with this model, or a new name",
            )

    def capacities(self, total: int) -> tuple[int, ...]:
        """Share ``total`` slots among the layers so that they hold the most uses.

        One text says only so much about the next: each layer's counts are taken half its own,
        half those of all layers. On recorded traces that neither gains nor loses against equal
        shares by more than 0.2 points of hits; it is for models whose layers differ more.
        """
        ordered = np.sort(self.uses, axis=1)[:, ::-1]
        held = np.concatenate([np.zeros((len(ordered), 1)), ordered.cumsum(axis=1)], axis=1)
        return marginal_capacities(held + held.mean(axis=0), total)

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "model": self.model,
                "identity": self.identity,
                "tokens": self.tokens,
                "uses": self.uses.tolist(),
            }
        )


def read_popularity(path: Path) -> Popularity:
    """Read what ``Popularity.to_json`` wrote.

    Raises
    ------
    TraceError, SpecError
        When the file is missing, damaged, or something else.
    """
    data = read_table(path)
    if data.get("schema") != SCHEMA:
        raise TraceError(f"{path} is {data.get('schema')!r}, not {SCHEMA!r}", hint=_HINT)
    model, identity = data.get("model"), data.get("identity")
    for name, text in (("model", model), ("identity", identity)):
        if not isinstance(text, str) and (name == "model" or text is not None):
            raise _damaged(path, f"{name} is {text!r}, not a text")
    tokens = data.get("tokens")
    if type(tokens) is not int or not 0 <= tokens <= LARGEST:
        raise _damaged(path, f"tokens is {tokens!r}, not a whole number from 0 to {LARGEST:g}")
    try:
        uses = np.array(data["uses"])
    except (KeyError, ValueError) as error:
        raise _damaged(path, repr(error)) from error
    if uses.ndim != 2 or uses.size == 0 or uses.dtype.kind != "i":
        raise _damaged(path, f"uses are {uses.dtype}{list(uses.shape)}, not rows of whole numbers")
    if uses.min() < 0 or uses.max() > tokens:
        wrong = uses.min() if uses.min() < 0 else uses.max()
        raise _damaged(path, f"an expert has {wrong} uses in {tokens} tokens")
    return Popularity(str(model), tokens, uses.astype(np.int64), identity)


def _damaged(path: Path, what: str) -> TraceError:
    return TraceError(f"{path} is damaged: {what}", hint=_HINT)
