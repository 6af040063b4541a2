"""How a model's router chooses: three habits, known of some families, assumed of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.describe.checked_table import Fields

_UNSURE = 0.12
"""How far the habits of a text at hand may lie from those of one that was replayed, as a share:
short traces of one topic each differ by about as much (two of DeepSeek-V2-Lite by 0.11)."""


@dataclass(frozen=True)
class RoutingLaw:
    """The habits of a router, as :func:`planner.foretell.routing.synthetic` draws from them.

    Parameters
    ----------
    skew
        Standard deviation of the experts' lasting popularity, beside a token's own taste.
    locality, persistence
        Standard deviation of the preference of the text at hand, and the share of it that is left a
        token later.
    origin
        What it is like, for the report.
    scattered, concentrated
        Laws between which nine of ten models of its kind may be; None for those that differ from it
        as texts differ.
    """

    skew: float
    locality: float
    persistence: float
    origin: str
    scattered: RoutingLaw | None = None
    concentrated: RoutingLaw | None = None

    @property
    def between(self) -> tuple[RoutingLaw, RoutingLaw]:
        """The band around it: the law that caches like least, and the one they like most."""
        return (
            self.scattered or self._times(1 - _UNSURE),
            self.concentrated or self._times(1 + _UNSURE),
        )

    def _times(self, factor: float) -> RoutingLaw:
        return replace(self, skew=self.skew * factor, locality=self.locality * factor)


RECORDED = RoutingLaw(0.85, 1.4, 0.74, "like recorded traces of DeepSeek-V2-Lite")
"""Fitted such that the share of the most popular quarter of experts, the chance to be used again 1,
4 and 16 tokens later, and the hit rates of an LRU cache at 25 % and 50 % of the slots come out
within a tenth of the recorded ones."""


@dataclass(frozen=True)
class PublishedLaw:
    """A law of a family.

    Parameters
    ----------
    families
        Its names in ``model_type``.
    model, params
        The model that was replayed, and its weights: of several, the nearest in size is taken.
    law
        Its habits.
    tokens
        Tokens of a replay that begins with an empty cache and misses as often as the published one
        even where every expert has a slot; 0 where hit rates are those of a cache in use.
    """

    families: tuple[str, ...]
    model: str
    params: float
    law: RoutingLaw
    tokens: int


def read_laws(data: Mapping[str, Any], where: str) -> tuple[PublishedLaw, ...]:
    """Read ``configs/routing.toml``.

    Raises
    ------
    SpecError
        When a field is missing or cannot be.
    """
    found = []
    for number, row in enumerate(data.get("law", ()), 1):
        fields = Fields(row, f"{where}, law {number}", like="the other laws of this file")
        fields.only(
            ("families", "model", "params", "skew", "locality", "persistence", "tokens", "source")
        )
        model = fields.text("model")
        law = RoutingLaw(
            skew=fields.number("skew", most=10.0),
            locality=fields.number("locality", most=10.0),
            persistence=fields.number("persistence", most=1.0),
            origin=f"like {model}'s ({fields.text('source')})",
        )
        found.append(
            PublishedLaw(
                families=tuple(map(str, row["families"])),
                model=model,
                params=fields.number("params", least=1.0),
                law=law,
                tokens=fields.count("tokens", least=0),
            )
        )
    return tuple(found)


def law_of(family: str, params: float, laws: Sequence[PublishedLaw]) -> RoutingLaw:
    """Return the law of a model: its family's, of the nearest size; else the middle of all.

    Parameters
    ----------
    family, params
        The model's ``model_type`` and the number of its weights.
    """
    own = [each for each in laws if family in each.families]
    if own:
        return min(own, key=lambda each: abs(math.log(each.params / params))).law
    return UNPUBLISHED


UNPUBLISHED = RoutingLaw(
    1.8,
    1.2,
    0.92,
    "the middle of nine published models, as nobody published this family's",
    scattered=RECORDED,
    concentrated=RoutingLaw(2.46, 1.27, 0.892, "the most concentrated that was published"),
)
"""For families of which nothing is published."""
