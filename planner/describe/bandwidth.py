"""Checks measured rates against the bandwidth that bounds them: none can be above it.

Measured rates of the same memory differ a little from one moment to the next. One that exceeds its
bound by more shows that the bound was measured wrong. Where both were measured together, the faster
one is the bandwidth (:func:`raised`); a description that contradicts itself is refused
(:func:`check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from hybrid.formats.registry import is_format, weight_bytes
from planner.errors import SpecError

TOLERANCE = 0.02
"""By how much two measurements next to each other differ."""
MEMORY_BYTES = 1 << 20
"""An expert of less may be read from a cache, with all the others of its model."""
_BOUNDS = {
    "cpu": ("cpu", "memory_bytes_per_s"),
    "gpu": ("gpu", "memory_bytes_per_s"),
    "copy": ("link", "bytes_per_s"),
}
_READING = (0, 1)
"""Loads of which nothing but reading takes time: a copy, and one token."""


def exceeds(rate: float, bound: float) -> bool:
    """Whether a measured rate contradicts what is said to bound it."""
    return rate > bound * (1 + TOLERANCE)


class _Measured(Protocol):
    """A machine with calibration points: a :class:`planner.describe.hardware.HardwareSpec`.

    That class checks itself with this module, which hence does not import it.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def points(self) -> tuple[Any, ...]: ...


_Machine = TypeVar("_Machine", bound=_Measured)


class _Reader(NamedTuple):
    """Who reads, how fast, and the quantity that bounds it."""

    what: str
    bytes_per_s: float
    part: str
    name: str


def _readers(spec: _Measured) -> Iterator[_Reader]:
    """Calibration points that nothing but reading from memory takes time of."""
    for point in spec.points:
        part, name = _BOUNDS.get(point.lane, ("", ""))
        size = _bytes(point)
        reading = point.load in _READING and size >= MEMORY_BYTES and point.seconds > 0
        if reading and getattr(spec, part, None) is not None:
            what = f"an expert of {point.hidden} x {point.intermediate} in {point.format}"
            yield _Reader(what, size / point.seconds, part, name)


def _bytes(point: Any) -> int:
    if not is_format(point.format):
        return 0
    return weight_bytes(point.matrices * point.hidden * point.intermediate, point.format)


def check(spec: _Measured, where: str) -> None:
    """Raise SpecError when a point of ``spec`` reads faster than its memory or link can."""
    for reader in _readers(spec):
        bound = getattr(getattr(spec, reader.part), reader.name).value
        if exceeds(reader.bytes_per_s, bound):
            raise SpecError(
                f"{where}: {reader.part} {reader.name} is {bound:.4g}, but {reader.what} is read"
                f" at {reader.bytes_per_s:.4g}: one of the two was measured wrong",
                hint=f"set {reader.name} to {reader.bytes_per_s:.4g} or more, or correct the point",
            )


def raised(spec: _Machine) -> _Machine:
    """Return ``spec`` with every bandwidth at least what its points read at.

    What is reached of it stays the same rate, a smaller part.
    """
    for reader in _readers(spec):
        holder = getattr(spec, reader.part)
        old, rate = getattr(holder, reader.name), reader.bytes_per_s
        if not exceeds(rate, old.value):
            continue
        origin = f"{reader.what} was read so fast; {old.value:.4g} by {old.origin}"
        values = {reader.name: replace(old, value=rate, origin=origin)}
        if (share := getattr(holder, "memory_efficiency", None)) is not None:
            values["memory_efficiency"] = replace(share, value=share.value * old.value / rate)
        spec = replace(spec, **{reader.part: replace(holder, **values)})
    return spec
