"""Scales by search: those that leave the least weighted squared error of a group.

A group's scale is not the one that its largest value asks for: among a few others near it, each
with its own codes, and each then fitted to these by least squares, one leaves less error. All
functions take groups ``[..., n]`` and importances of the same shape, and return scales ``[...]``
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.groups import inverse
from hybrid.formats.strips import F32

#: Steps away from what the largest value asks for, in parts of a code.
_STEPS = np.linspace(-0.9, 0.9, 7, dtype=np.float32)
#: Codes by which the range of an affine group is taken for narrower or wider.
_RANGES = np.linspace(-0.8, 0.6, 8, dtype=np.float32)


def importance(x: F32, columns: F32 | None = None) -> F32:
    """What an error of each weight counts for where nothing better is known: its own size.

    Parameters
    ----------
    x
        Weights in groups, ``[N, ..., n]``.
    columns
        The mean squares of the inputs that they multiply, as many as a row has, where these are
        known: an error counts for that, and in part for the weight's size, as in llama.cpp.
    """
    square = x * x
    mean = np.mean(square, axis=-1, keepdims=True)
    weighted: F32 = np.sqrt(mean) + np.abs(x)
    if columns is not None:
        weighted = columns.reshape(1, *x.shape[1:]) * np.sqrt(mean + square)
    return weighted


def weighted(errors: F32, columns: F32 | None) -> F32:
    """Sum squared errors ``[N, ..., n]`` over groups, each by the importance of its input."""
    if columns is not None:
        errors = errors * columns.reshape(1, *errors.shape[1:])
    total: F32 = errors.sum(axis=-1)
    return total


def _dot(*factors: F32) -> F32:
    """Sum over a group of a product."""
    letters = ",".join(["...i"] * len(factors))
    total: F32 = np.einsum(f"{letters}->...", *factors)
    return total


def symmetric(x: F32, weights: F32, span: float, rounded: Callable[[F32], F32]) -> F32:
    """Return scales d of ``x`` about ``d * rounded(x / d)``.

    Parameters
    ----------
    span
        What the value of largest magnitude is divided by, sign included, at first.
    rounded
        The numbers of codes that are nearest to ``x / d``.
    """
    at = np.argmax(np.abs(x), axis=-1)[..., None]
    extreme = np.take_along_axis(x, at, axis=-1)[..., 0]
    best = extreme / np.float32(span)
    gain = np.full(best.shape, -1, np.float32)
    towards = inverse(extreme)
    for step in _STEPS:
        codes = rounded(x * (towards * np.float32(span + np.sign(span) * step))[..., None])
        along, size = _dot(weights, x, codes), _dot(weights, codes, codes)
        won = np.divide(along * along, size, out=np.zeros_like(size), where=size > 0)
        better = won > gain
        fitted = np.divide(along, size, out=np.zeros_like(size), where=size > 0)
        best, gain = np.where(better, fitted, best), np.where(better, won, gain)
    return best


def affine(x: F32, weights: F32, top: int, *, negative: bool = False) -> tuple[F32, F32]:
    """Return d and m of ``x`` about ``d q - m``, q in 0..``top``.

    ``m`` is at least 0 unless it may be ``negative``.
    """
    low, high = x.min(axis=-1), x.max(axis=-1)
    if not negative:
        low = np.minimum(low, 0)
    towards = inverse(high - low)
    sum_w, sum_x = weights.sum(axis=-1), _dot(weights, x)
    above = x - low[..., None]
    scale, shift = (high - low) / np.float32(top), -low
    least = np.full(low.shape, np.inf, np.float32)
    for step in _RANGES:
        codes = np.rint(above * (towards * np.float32(top + step))[..., None])
        np.clip(codes, 0, top, out=codes)
        one, two, across = (
            _dot(weights, codes),
            _dot(weights, codes, codes),
            _dot(weights, x, codes),
        )
        det = sum_w * two - one * one
        fits = det > 0
        d = np.divide(sum_w * across - sum_x * one, det, out=np.zeros_like(det), where=fits)
        m = np.divide(one * across - two * sum_x, det, out=np.zeros_like(det), where=fits)
        if not negative:
            alone = np.divide(across, two, out=np.zeros_like(two), where=two > 0)
            d, m = np.where(m < 0, alone, d), np.maximum(m, 0)
        # What is left of the squared error, but for the squares of x, which are the same for all.
        error = d * d * two - 2 * d * across - 2 * m * (d * one - sum_x) + m * m * sum_w
        better = fits & (error < least)
        scale, shift = np.where(better, d, scale), np.where(better, m, shift)
        least = np.where(better, error, least)
    return scale, shift


def zeroed(x: F32, weights: F32, top: int) -> tuple[F32, F32]:
    """Return d and a whole z in 0..``top`` of ``x`` about ``d (q - z)``, q in 0..``top``."""
    low, high = np.minimum(x.min(axis=-1), 0), np.maximum(x.max(axis=-1), 0)
    towards = inverse(high - low)
    scale, zero = (high - low) / np.float32(top), np.zeros_like(low)
    gain = np.full(low.shape, -1, np.float32)
    for step in _RANGES:
        steps = towards * np.float32(top + step)
        z = np.clip(np.rint(-low * steps), 0, top)
        codes = np.rint(x * steps[..., None])
        np.clip(codes, -z[..., None], top - z[..., None], out=codes)
        along, size = _dot(weights, x, codes), _dot(weights, codes, codes)
        won = np.divide(along * along, size, out=np.zeros_like(size), where=size > 0)
        fitted = np.divide(along, size, out=np.zeros_like(size), where=size > 0)
        better = won > gain
        scale, zero = np.where(better, fitted, scale), np.where(better, z, zero)
        gain = np.where(better, won, gain)
    return scale, zero


def between(low: int, high: int) -> Callable[[F32], F32]:
    """Whole numbers from ``low`` to ``high``, as :func:`symmetric` takes them."""

    def rounded(x: F32) -> F32:
        codes: F32 = np.rint(x)
        return np.clip(codes, low, high, out=codes)

    return rounded


def nearest(table: NDArray[Any], x: F32) -> NDArray[np.uint8]:
    """Return which number of a sorted ``table`` is nearest to each x."""
    middles = (table[1:].astype(np.float32) + table[:-1].astype(np.float32)) / 2
    places = np.zeros(x.shape, np.uint8)
    for middle in middles:
        places += x > middle
    return places
