"""Matrix units: experts and matrices of many tokens beside the naive twin."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import naive
from cpu_experts import tiles
from cpu_experts.errors import BackendError
from cpu_experts.jit.workers import use_threads, used_threads
from hybrid.formats.block import Block
from hybrid.formats.matrix import pack, unpack
from hybrid.formats.registry import quantized_formats
from random_experts import random_experts

rng = np.random.default_rng(0)
needs_units = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT) or not tiles.available(),
    reason="this processor has no AMX, or is told to do without",
)

#: Sums in float32 against float64; the roundings to bfloat16 are the twin's, too, but an activation
#: that lies between two of its numbers may fall to the other side.
TOLERANCE = 2e-3

SHAPES: dict[str, dict[str, Any]] = {
    "silu": {},
    "ragged": {"hidden": 200, "intermediate": 72},
    "ungated": {"gated": False, "activation": "relu2", "intermediate": 128},
    "biases": {"bias": True, "intermediate": 160},
    "gpt_oss": {"bias": True, "limit": 1.5, "alpha": 1.702, "up_offset": 1.0},
    "wide": {"hidden": 2560, "intermediate": 32},
    "bf16": {"format": "bf16"},
    "q4_0": {"format": "q4_0"},
    "mixed": {"format": "q4_k", "down_format": "q6_k"},
}


def _shape(name: str) -> Block:
    values: dict[str, Any] = {"hidden": 96, "intermediate": 96, "format": "q8_0"}
    return Block(**values | SHAPES[name])


@needs_units
@pytest.mark.parametrize("name", SHAPES)
def test_experts_equal_the_twin(name: str) -> None:
    """Loads below, at and above a tile and a block of tokens; ids that are elsewhere."""
    shape = _shape(name)
    blocks, unpacked = random_experts(shape, 5)
    ids = np.repeat([[0, -1], [1, 7], [2, 0], [3, 1]], (15, 17, 33, 1), axis=0)
    x = rng.standard_normal((len(ids), shape.hidden), dtype=np.float32)
    weights = rng.random(ids.shape, dtype=np.float32)
    wanted = 1.0 + naive.experts(shape, unpacked, x, ids, weights, bf16=True)
    found = np.ones_like(x)
    tiles.run_experts(x, ids, weights, blocks, shape, found)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * np.abs(wanted - 1.0).max())


@needs_units
def test_any_number_of_threads_gives_the_same() -> None:
    """Bit for bit, experts and matrices."""
    shape = _shape("biases")
    blocks, _ = random_experts(shape, 5)
    x = rng.standard_normal((70, shape.hidden), dtype=np.float32)
    ids = rng.integers(0, len(blocks), (70, 2))
    weights = rng.random(ids.shape, dtype=np.float32)
    matrix = pack(rng.standard_normal((300, shape.hidden), dtype=np.float32), "q4_0")
    before, found = used_threads(), []
    try:
        for threads in (1, before):
            use_threads(threads)
            out, product = np.zeros_like(x), np.zeros((70, 300), np.float32)
            tiles.run_experts(x, ids, weights, blocks, shape, out)
            tiles.linear(x, matrix, "q4_0", None, product)
            found.append((out, product))
    finally:
        use_threads(before)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_units
@pytest.mark.parametrize("fmt", [*quantized_formats(), "bf16"])
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(1, 32, 1), (40, 96, 16), (150, 1056, 45)])
def test_matrices_equal_the_twin(fmt: str, rows: int, cols: int, tokens: int) -> None:
    """Odd strips, rows that do not fill one, more inputs than a thread's tiles hold, a bias.

    Weights that lie between two numbers of bfloat16 may fall to either.
    """
    packed = pack(rng.standard_normal((rows, cols), dtype=np.float32), fmt)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32)
    weight = naive.to_bf16(unpack(packed, rows, cols, fmt)).astype(np.float64)
    wanted = naive.to_bf16(x).astype(np.float64) @ weight.T + bias
    for given, value in ((bias, wanted), (None, wanted - bias)):
        out = np.full((tokens, rows), np.nan, np.float32)
        tiles.linear(x, packed, fmt, given, out)
        np.testing.assert_allclose(out, value, atol=5e-4 * np.abs(value).max())


@needs_units
def test_what_is_not_a_number_stays_with_its_token() -> None:
    """An infinity makes its own token's outputs no numbers and no other's."""
    packed = pack(rng.standard_normal((40, 64), dtype=np.float32), "q8_0")
    x = rng.standard_normal((20, 64), dtype=np.float32)
    x[3, 5] = np.inf
    out = np.zeros((20, 40), np.float32)
    tiles.linear(x, packed, "q8_0", None, out)
    assert not np.isfinite(out[3]).any()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def test_what_they_do_not_take_is_refused() -> None:
    """Formats and widths without tiles, and every format where there are no units."""
    x, out = np.zeros((2, 40), np.float32), np.zeros((2, 16), np.float32)
    for fmt in ("f32", "bf16"):
        packed = pack(np.ones((16, 40), np.float32), fmt)
        with pytest.raises(
            BackendError, match=f"a matrix of {fmt} with 40 inputs is not multiplied"
        ):
            tiles.linear(x, packed, fmt, None, out)


def test_units_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a processor that is told to do without, whatever this one has."""
    monkeypatch.setenv("HYBRID_SIMD", "portable")
    assert not tiles.available()
    assert not tiles.takes("q4_0", 64)
