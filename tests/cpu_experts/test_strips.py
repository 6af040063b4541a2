"""The micro-kernels by themselves: every format, every number of rows at once."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from cpu_experts.kernels.micro import (
    ROW_BLOCKS,
    exp_all,
    largest_of,
    quantize_group,
    silu_strip,
    sums_of,
    to_half,
)
from cpu_experts.kernels.reading import read_words
from hybrid.formats.activations import ACT_GROUP, round_activations
from hybrid.formats.matrix import pack, unpack
from hybrid.formats.registry import FORMATS, format_of, is_quantized
from hybrid.formats.strips import GROUP
from micro_kernels import strip_caller


@njit
def _quantize(x, sums, act, groups):
    for g in range(groups):
        quantize_group(x, g * GROUP, sums, act, g * ACT_GROUP)


def _activation_rows(x: np.ndarray, fmt: str) -> tuple[np.ndarray, int, int]:
    units = format_of(fmt).units(x.shape[1])
    if not is_quantized(fmt):
        return x.reshape(-1).view(np.uint8), 4 * x.shape[1], units
    groups = x.shape[1] // GROUP
    act = np.zeros(x.shape[0] * groups * ACT_GROUP, np.uint8)
    _quantize(x.reshape(-1), np.int32(sums_of(fmt)), act, x.shape[0] * groups)
    return act, groups * ACT_GROUP, units


@pytest.mark.parametrize("fmt", FORMATS)
def test_strip_dot_equals_numpy(fmt: str) -> None:
    """16 rows times gathered activation rows, by each number of them; no lane overflows."""
    rng, cols = np.random.default_rng(0), 512
    w = rng.standard_normal((16, cols)).astype(np.float32)
    w[0], w[1] = 1, -1  # every code at its largest, all of one sign
    w[2] = np.where(np.arange(cols) % 2, 1, -1)
    packed, layout = pack(w, fmt), format_of(fmt).layout
    if layout is not None:  # rows of the lowest and of the highest code there is
        codes = packed.reshape(-1, layout.unit_bytes)[:, : layout.subs_at]
        for row, byte in ((3, 0), (4, 255)):
            codes.reshape(len(codes), -1, 64)[..., 4 * row : 4 * row + 4] = byte
    weights = unpack(packed, 16, cols, fmt)
    padded = np.concatenate([np.zeros(64, np.uint8), packed])
    for n in ROW_BLOCKS:
        x = rng.standard_normal((n + 2, cols)).astype(np.float32)
        x[0], x[1] = 1, -1
        act, stride, inner = _activation_rows(x, fmt)
        seen = round_activations(x) if is_quantized(fmt) else x
        rows = np.arange(n + 1, -1, -1).astype(np.int32)
        call = strip_caller(fmt, n)
        for first in range(3):
            out = np.full(16 * n + 7, np.nan, np.float32)
            call(padded, 64, act, stride, rows, first, inner, out, 7)
            want = seen[rows[first : first + n]].astype(np.float64) @ weights.T
            np.testing.assert_allclose(out[7:].reshape(n, 16), want, rtol=2e-6, atol=3e-4)
            assert np.isnan(out[:7]).all()


@pytest.mark.parametrize("n", ROW_BLOCKS)
def test_strips_of_halves_equal_numpy(n: int) -> None:
    """Keys and values: 16 rows in half precision, subnormal ones included."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 96)).astype(np.float16)
    w[3] *= np.float16(1e-5)
    x = rng.standard_normal((n, 96)).astype(np.float32)
    strip = np.ascontiguousarray(w.T).view(np.uint8).reshape(-1)
    out, rows = np.zeros(16 * n, np.float32), np.arange(n).astype(np.int32)
    strip_caller("f16", n)(strip, 0, x.view(np.uint8).reshape(-1), 4 * 96, rows, 0, 96, out, 0)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(out.reshape(n, 16), want, atol=1e-5)


def test_halves_are_rounded_as_numpy_does() -> None:
    """To the nearest, ties to even; subnormal, overflowing and infinite numbers; NaN stays NaN."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2000) * 10.0 ** rng.integers(-9, 6, 2000)
    ties = np.arange(2000) * 0.5 + 2048
    edges = [0.0, -0.0, 65519.9, 65520.0, -1e30, np.inf, 2**-24, 2**-25, 3 * 2**-26, 2**-14]
    values = np.concatenate((x, -ties, ties, edges)).astype(np.float32)

    @njit
    def convert(values, out):
        for i in range(values.size):
            out[i] = to_half(values[i])

    out = np.zeros(values.size, np.uint16)
    convert(values, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, values.astype(np.float16).view(np.uint16))
    convert(np.array([np.nan], np.float32), out)
    assert np.isnan(out[:1].view(np.float16)[0])


def test_weights_of_attention() -> None:
    """exp of a row of scores less the largest, and its sum; -inf counts as nothing."""
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 20
    x[[3, 40]] = -np.inf

    @njit
    def call(x):
        largest = largest_of(x, 16, 48)
        return largest, exp_all(x, 16, 48, largest)

    out = x.copy()
    largest, total = call(out)
    assert largest == x[16:].max()
    want = np.exp(x[16:].astype(np.float64) - float(largest))
    np.testing.assert_allclose(out[16:], want, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(total, want.sum(), rtol=1e-6)
    np.testing.assert_array_equal(out[:16], x[:16])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 131071, 131072, 131137, 400000])
def test_memory_is_read_once(size: int, threads: int) -> None:
    """The sum of random words is numpy's: none is left out or read twice, at whatever address."""
    words = np.random.default_rng(size).integers(0, 2**64, size + 1, np.uint64)[1:]
    with np.errstate(over="ignore"):
        assert read_words(words, threads) == int(words.sum(dtype=np.uint64))


def test_silu_is_accurate_over_the_whole_range() -> None:
    """As good as a float32 exponent allows, and no overflow at either end."""
    g = np.concatenate(
        [np.linspace(-90, 90, 4096), [-1e30, 1e30, 0.0, -0.0], np.linspace(-1, 1, 4092)]
    ).astype(np.float32)
    out = np.zeros_like(g)

    @njit
    def call(g, alpha, out):
        for at in range(0, g.size, 16):
            silu_strip(g, at, alpha, out, at)

    with np.errstate(over="ignore"):
        call(g, np.float32(1.702), out)
    exponent = np.float64(1.702) * g
    exact = g / (1 + np.exp(-np.maximum(exponent, -700)))
    # The exponent itself is a float32: half a step of it is a relative error of the result.
    bound = (5e-7 + np.minimum(np.abs(exponent), 90) * 2**-23) * np.abs(exact) + 2e-36
    assert (np.abs(out - exact) <= bound).all()
