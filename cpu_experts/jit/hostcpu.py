"""What this processor has, and what the kernels and every decision take it for.

That is one thing with one switch, ``HYBRID_SIMD=LEVEL[-emulated][+bf16][+amx]``: the vector
instructions that the kernels use, and the units for bfloat16 that count as there. Unset, it is what
the processor has. ``avx2`` makes a processor with AMX decide as one without any such unit does;
``avx512vnni-emulated+bf16+amx`` makes one with AVX2 decide all that a Sapphire Rapids would,
slowly.

It changes what is decided (types, formats, which products are tried, which calibration is valid)
and the kernels' instructions, and nothing else: numba compiles the other loops for the processor
as it is, and torch (oneDNN) multiplies bfloat16 with whatever units it finds, AMX included, or with
none. So a text is that of the processor one asks for, but for rounding; times are not.

Imports neither numba nor torch, so that ``hybrid env`` can ask.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
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
#: Units that multiply bfloat16, each with the LLVM features (x86, ARM) of which one is enough.
UNITS: dict[str, frozenset[str]] = {
    "bf16": frozenset({"avx512bf16", "bf16"}),
    "amx": frozenset({"amx-bf16"}),
}
GRAMMAR = f"LEVEL[{EMULATED}]{''.join(f'[+{unit}]' for unit in UNITS)}"


@dataclass(frozen=True)
class Processor:
    """A processor as far as anything here depends on it; as text, a value of ``HYBRID_SIMD``.

    Attributes
    ----------
    level
        The vector instructions of the kernels, one of :data:`LEVELS`.
    emulated
        Whether they are spelled out in those of AVX2, see :mod:`cpu_experts.kernels.simd_loops`.
    units
        What multiplies bfloat16 natively, of :data:`UNITS`.
    """

    level: str
    emulated: bool = False
    units: frozenset[str] = frozenset()

    def __str__(self) -> str:
        units = "".join(f"+{unit}" for unit in UNITS if unit in self.units)
        return f"{self.kernels}{units}"

    @property
    def kernels(self) -> str:
        """The part that kernels are compiled by: ``LEVEL[-emulated]``."""
        return self.level + (EMULATED if self.emulated else "")


@cache
def host_features() -> frozenset[str]:
    """Return the vector features of this processor under LLVM's names."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def available_levels(features: Iterable[str]) -> tuple[str, ...]:
    """Return the levels that a processor with ``features`` can run, best first."""
    have = frozenset(features)
    return tuple(level for level, needs in LEVELS.items() if needs <= have)


def available_units(features: Iterable[str]) -> frozenset[str]:
    """Return the units for bfloat16 of a processor with ``features``."""
    return frozenset(unit for unit, any_of in UNITS.items() if not any_of.isdisjoint(features))


def choose(features: Iterable[str], override: str | None = None) -> Processor:
    """Return a processor with ``features`` as it is, or as ``override`` would have it.

    Raises
    ------
    BackendError
        When ``override`` is no value of ``HYBRID_SIMD``, or its level cannot run.
    """
    have = frozenset(features)
    levels = available_levels(have)
    if not override:
        return Processor(levels[0], units=available_units(have))
    kernels, *units = override.split("+")
    level, emulated = kernels.removesuffix(EMULATED), kernels.endswith(EMULATED)
    if level not in LEVELS:
        raise _wrong(override, f"{level!r} is no SIMD level")
    for unit in units:
        if unit not in UNITS:
            raise _wrong(override, f"{unit!r} is no unit for bfloat16")
    if emulated and (level == "portable" or "avx2" not in levels):
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={override!r} cannot be emulated on this processor",
            hint="emulation needs AVX2 and one of the levels avx512vnni, avxvnni, avx2",
        )
    if not emulated and level not in levels:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={override} needs {', '.join(sorted(LEVELS[level]))};"
            f" this processor runs {', '.join(levels)}",
            hint=f"unset {ENVIRONMENT_VARIABLE} or choose one of those",
        )
    return Processor(level, emulated, frozenset(units))


def _wrong(override: str, why: str) -> BackendError:
    return BackendError(
        f"{ENVIRONMENT_VARIABLE}={override!r}: {why}",
        hint=f"write {GRAMMAR} with one of the levels {', '.join(LEVELS)}; units that are not"
        f" named do not count as there",
    )


def processor() -> Processor:
    """Return this processor as it is, or as the environment would have it.

    Raises
    ------
    BackendError
        As for :func:`choose`.
    """
    return choose(host_features(), os.environ.get(ENVIRONMENT_VARIABLE))


def actual() -> Processor:
    """Return this processor as it is, whatever the environment says."""
    return choose(host_features())
