"""Elements: weights as publishers of quantized checkpoints have them, each with all it is made of.

A matrix of elements can be cut, joined and transposed like one of numbers, as loading a model may
do with it, and then be laid out in a format of ours without a second rounding, where one holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.groups import Fields
from hybrid.formats.strips import F32
from hybrid.formats.tables import FLOATS8, FP4, half_powers

#: What an element stands for: ``scale`` times the whole number; times the float of 8 bits ``sub``
#: and what the code stands for in FP4; times 2^(``sub`` - 127) and that; times a number of NF4.
WHOLE, NVFP4, MXFP4, NORMAL = range(4)

ELEMENT = np.dtype([("number", "<i2"), ("sub", "u1"), ("kind", "u1"), ("scale", "<f4")])

#: The numbers of NF4 (2305.14314, appendix E), of which :data:`hybrid.formats.tables.NF4` has the
#: nearest whole steps.
NORMAL_FLOATS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

#: What a byte stands for as a float of 8 bits, with its sign; the last of either is no number.
_SIGNED8 = np.append(FLOATS8[:127], np.float32(np.nan))
_SIGNED8 = np.concatenate([_SIGNED8, -_SIGNED8]).astype(np.float32)

Elements = NDArray[Any]


def elements(shape: tuple[int, int], kind: int) -> Elements:
    """Return elements of a kind that are all to be filled in, ``[N, K]``."""
    found = np.zeros(shape, ELEMENT)
    found["kind"] = kind
    return found


def numbers_of(of: Elements) -> F32:
    """Return in float32 what elements stand for; of damaged scales what is not finite."""
    kinds = np.unique(of["kind"])
    with np.errstate(invalid="ignore", over="ignore"):
        if len(kinds) == 1:
            return _NUMBERS[kinds[0]](of)
        found = np.empty(of.shape, np.float32)
        for kind in kinds:
            own = of["kind"] == kind
            found[own] = _NUMBERS[kind](of[own])
    return found


def _whole(of: Elements) -> F32:
    values: F32 = of["scale"] * of["number"].astype(np.float32)
    return values


def _nvfp4(of: Elements) -> F32:
    scales = of["scale"] * (_SIGNED8[of["sub"]] * np.float32(0.5))
    values: F32 = scales * FP4.astype(np.float32)[of["number"]]
    return values


def _mxfp4(of: Elements) -> F32:
    scales = np.where(of["sub"] == 255, np.float32(np.nan), half_powers(of["sub"]))
    values: F32 = scales * FP4.astype(np.float32)[of["number"]]
    return values


def _normal(of: Elements) -> F32:
    values: F32 = of["scale"] * NORMAL_FLOATS[of["number"]]
    return values


_NUMBERS: dict[int, Callable[[Elements], F32]] = {
    WHOLE: _whole,
    NVFP4: _nvfp4,
    MXFP4: _mxfp4,
    NORMAL: _normal,
}


def zero_of(kind: int) -> int:
    """Return the number of an element of 0."""
    return int(np.flatnonzero(NORMAL_FLOATS == 0)[0]) if kind == NORMAL else 0


class Held(NamedTuple):
    """Fields of a format that stand for elements, and whether for exactly the same numbers."""

    fields: Fields
    exact: bool


def all_of(of: Elements, kind: int) -> bool:
    """Whether all elements are of one kind."""
    return bool((of["kind"] == kind).all())


def shared(values: NDArray[Any]) -> NDArray[Any] | None:
    """Return what all of a group ``[..., n]`` have in common, ``[...]``; None where some differ."""
    first = values[..., :1]
    return first[..., 0] if bool((values == first).all()) else None


def halves(scales: F32) -> tuple[NDArray[np.float16], bool] | None:
    """Return scales in half precision, and whether none was rounded; None if one is too large."""
    with np.errstate(over="ignore"):
        found = scales.astype(np.float16)
    if not np.isfinite(found).all():
        return None
    return found, bool((found.astype(np.float32) == scales).all())
