"""Lists the cache policies by name: a new one is a file beside this one and its line here.

Policies that know the future (:mod:`planner.decide.oracles`) are for comparison only: nobody can
choose them for a run.
"""

from __future__ import annotations

import numpy as np

from planner.decide.policies.arc import ARC
from planner.decide.policies.blend import Blend
from planner.decide.policies.forecast import Forecast
from planner.decide.policies.lfu import LFU
from planner.decide.policies.lru import LRU
from planner.decide.policies.mrs import MRS
from planner.decide.policies.static import StaticPopularity
from planner.decide.policy import Policy
from planner.decide.popularity import Popularity
from planner.errors import SpecError

POLICIES: dict[str, type[Policy]] = {
    kind.name: kind for kind in (LRU, LFU, ARC, StaticPopularity, MRS, Blend, Forecast)
}
"""Every policy that can be chosen, made of a model's layers and experts a layer."""
DEFAULT_POLICY = Blend.name
"""The policy of runs and dry runs that name no other."""


def names() -> tuple[str, ...]:
    """Return what policies can be chosen."""
    return tuple(POLICIES)


def check_policy(name: str) -> str:
    """Return the name of a policy.

    Raises
    ------
    SpecError
        When there is none of that name; the hint lists those that there are.
    """
    if name not in POLICIES:
        raise SpecError(
            f"unknown cache policy: {name!r}", hint=f"choose one of: {', '.join(POLICIES)}"
        )
    return name


def policy(name: str, layers: int, experts: int, popularity: Popularity | None = None) -> Policy:
    """Make a cache policy.

    Parameters
    ----------
    name
        One of :func:`names`.
    layers, experts
        L and E of the model.
    popularity
        What earlier sessions used, which it knows then; None is nothing.

    Raises
    ------
    SpecError
        When there is none of that name.
    TraceError
        When ``popularity`` is of a model of another shape.
    """
    made = POLICIES[check_policy(name)](layers, experts)
    if popularity is not None and popularity.tokens:
        popularity.check(layers, experts, "the popularity file")
        made.inform(popularity.uses.astype(np.float64), popularity.tokens)
    return made
