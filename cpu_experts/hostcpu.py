"""Which vector instructions this processor has, and which level the kernels use.

Imports neither numba nor torch, so that ``hybrid env`` can ask.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

from cpu_experts.errors import BackendError

ENVIRONMENT_VARIABLE = "HYBRID_SIMD"
EMULATED = "-emulated"

#: Levels from best to plainest, each with the LLVM target features that it takes.
LEVELS: dict[str, frozenset[str]] = {
    "avx512vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}),
    "avxvnni": frozenset({"avx2", "fma", "f16c", "avxvnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}


@cache
def host_features() -> frozenset[str]:
    """Return the vector features of this processor under LLVM's names."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def available_levels(features: Iterable[str]) -> tuple[str, ...]:
    """Return the levels that a processor with ``features`` can run, best first."""
    have = frozenset(features)
    return tuple(level for level, needs in LEVELS.items() if needs <= have)


def choose_level(features: Iterable[str], override: str | None = None) -> str:
    """Return the best level that can run, or ``override`` if that one can.

    Raises
    ------
    BackendError
        When ``override`` is no level, or one that ``features`` cannot run.
    """
    levels = available_levels(features)
    if not override:
        return levels[0]
    if override not in LEVELS:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={override!r} is no SIMD level",
            hint=f"choose one of: {', '.join(LEVELS)}",
        )
    if override not in levels:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={override} needs {', '.join(sorted(LEVELS[override]))};"
            f" this processor runs {', '.join(levels)}",
            hint=f"unset {ENVIRONMENT_VARIABLE} or choose one of those",
        )
    return override


def host_level() -> str:
    """Return the level used in this process: the host's best, or the environment's choice.

    A choice of ``LEVEL-emulated`` is kept as it is, see :mod:`cpu_experts.simd`.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE)
    if choice and choice.endswith(EMULATED):
        level = choice.removesuffix(EMULATED)
        if level in LEVELS and level != "portable" and "avx2" in available_levels(host_features()):
            return choice
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={choice!r} cannot be emulated on this processor",
            hint="emulation needs AVX2 and one of the levels avx512vnni, avxvnni, avx2",
        )
    return choose_level(host_features(), choice)
