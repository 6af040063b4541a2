"""The cache policies that can be asked for by name.

Loads neither torch nor numba.
"""

from __future__ import annotations

from hybrid.errors import UsageError
from planner.decide.policies import Blend

DEFAULT_POLICY = Blend.name
POLICIES = (DEFAULT_POLICY,)


def check_policy(name: str) -> str:
    """Return ``name``; refuse what is no cache policy.

    Raises
    ------
    UsageError
        Naming the known ones.
    """
    if name not in POLICIES:
        raise UsageError(
            f"unknown cache policy: {name!r}", hint=f"choose one of: {', '.join(POLICIES)}"
        )
    return name
