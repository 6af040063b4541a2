"""Weight formats: the same numbers as GGUF's, in the layout the kernels expect."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import naive
from hybrid.formats import q4_0, q8_0
from hybrid.formats.activations import quantize_activations, round_activations
from hybrid.formats.bf16 import from_bf16, to_bf16
from hybrid.formats.block import Block, pack_expert, unpack_expert
from hybrid.formats.errors import FormatError, ShapeError
from hybrid.formats.matrix import pack, packed_bytes, unpack
from hybrid.formats.registry import FORMATS, format_of

GGUF = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
QUANTIZERS = {
    "q4_0": (q4_0.quantize, naive.quantize_q4_0),
    "q8_0": (q8_0.quantize, naive.quantize_q8_0),
}
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64])),
    elements=st.floats(-1000, 1000, width=32).map(lambda v: 0.0 if abs(v) < 1e-20 else v),
)


def _random(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("fmt", GGUF)
def test_values_equal_gguf_bit_for_bit(fmt: str) -> None:
    """Packing and unpacking gives exactly what ggml's quantizer gives, zero groups included."""
    w = _random(48, 320)
    w[0, :32] = 0
    w[1] *= 1e-6
    w[2] *= 3000
    theirs = gguf.quants.dequantize(gguf.quants.quantize(w, GGUF[fmt]), GGUF[fmt])
    np.testing.assert_array_equal(unpack(pack(w, fmt), 48, 320, fmt), theirs)


@pytest.mark.parametrize("fmt", GGUF)
@given(w=matrices)
@settings(max_examples=60, deadline=None)
def test_codes_equal_naive(fmt: str, w: np.ndarray) -> None:
    """The vectorised quantizers agree with loops over single values."""
    ours, one = QUANTIZERS[fmt]
    codes, scales = ours(w)
    for row in range(w.shape[0]):
        for g in range(w.shape[1] // 32):
            want, d = one(w[row, 32 * g : 32 * g + 32])
            assert list(codes[row, 32 * g : 32 * g + 32]) == want
            assert scales[row, g] == d


def test_q4_0_layout_byte_by_byte() -> None:
    """A strip's blocks are laid out as the module's table says."""
    w = _random(16, 64)
    codes, scales = q4_0.quantize(w)
    want = b"".join(
        naive.strip_bytes_q4_0(codes[:, 32 * g : 32 * g + 32], scales[:, g]) for g in range(2)
    )
    assert pack(w, "q4_0").tobytes() == want


@pytest.mark.parametrize(("fmt", "bound"), [("q4_0", 1 / 8), ("q8_0", 0.5 / 127), ("bf16", 2**-8)])
def test_error_is_bounded_by_the_groups_largest_value(fmt: str, bound: float) -> None:
    """Off by a code's width (q4_0: the clipped end) or half of one, and the scale's rounding."""
    w = _random(32, 256)
    error = np.abs(unpack(pack(w, fmt), 32, 256, fmt) - w).reshape(32, -1, 32)
    largest = np.abs(w).reshape(32, -1, 32).max(-1, keepdims=True)
    assert (error <= (bound + 2**-11) * largest).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (17, 33), (40, 100)])
def test_ragged_sizes_round_trip(fmt: str, rows: int, cols: int) -> None:
    """Padding never leaks into values, and sizes are what packed_bytes says."""
    w = _random(rows, cols)
    buf = pack(w, fmt)
    assert buf.size == packed_bytes(rows, cols, fmt)
    padded = np.zeros((rows, -(-cols // 32) * 32), np.float32)
    padded[:, :cols] = w
    want = unpack(pack(padded, fmt), rows, padded.shape[1], fmt)[:, :cols]
    np.testing.assert_array_equal(unpack(buf, rows, cols, fmt), want)


def test_f32_is_exact_and_bf16_rounds_to_even() -> None:
    """f32 keeps every bit; bf16 conversion equals torch's, NaN and infinity included."""
    import torch

    w = _random(20, 50)
    np.testing.assert_array_equal(unpack(pack(w, "f32"), 20, 50, "f32"), w)
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, 1e-40, 3e38, 1.00390625, 1.01171875], np.float32
    )
    values = np.concatenate([w.reshape(-1), special])
    want = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), want)
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32))))[0]


def test_activations_round_to_the_nearest_code() -> None:
    """Rounded activations are within half a step, and zero and tiny groups come out as zero."""
    x = _random(5, 70)
    x[1] = 0
    x[2] = 1e-38
    codes, scales = quantize_activations(x)
    assert codes.shape == (5, 96)
    step = np.repeat(scales, 32, axis=1)[:, :70]
    assert (np.abs(round_activations(x) - x) <= 0.5001 * step + 1e-37).all()
    assert not codes[1:3].any()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_expert_block_round_trip(gated: bool, bias: bool) -> None:
    """An f32 block gives back every matrix and bias it was made of."""
    shape = Block(hidden=50, intermediate=70, format="f32", gated=gated, bias=bias)
    parts = {
        "gate": _random(70, 50, 1) if gated else None,
        "up": _random(70, 50, 2),
        "down": _random(50, 70, 3),
        "gate_bias": _random(1, 70, 4)[0] if gated and bias else None,
        "up_bias": _random(1, 70, 5)[0] if bias else None,
        "down_bias": _random(1, 50, 6)[0] if bias else None,
    }
    weights = unpack_expert(shape, pack_expert(shape, **parts))
    for name, value in parts.items():
        got = getattr(weights, name)
        assert (got is None) == (value is None)
        if value is not None:
            np.testing.assert_array_equal(got, value)


def test_errors_name_the_thing_and_both_values() -> None:
    """Unknown formats, wrong shapes and values without a scale are refused, each by name."""
    with pytest.raises(FormatError, match="'q5_1'") as caught:
        format_of("q5_1")
    assert "q4_0" in str(caught.value.hint)
    with pytest.raises(ShapeError, match="float64"):
        pack(np.zeros((16, 32)), "q4_0")
    with pytest.raises(FormatError, match=r"takes 288 bytes, the buffer has 10"):
        unpack(np.zeros(10, np.uint8), 16, 32, "q4_0")
    with pytest.raises(FormatError, match="1 of 512 weights are infinite or NaN"):
        pack(np.where(np.arange(512) == 7, np.float32(np.inf), 1).reshape(16, 32), "q8_0")
    with pytest.raises(FormatError, match=r"weights up to 1e\+09 have no fp16 scale in q8_0"):
        pack(np.full((16, 32), 1e9, np.float32), "q8_0")
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    with pytest.raises(ShapeError, match=r"up is float32 \[32, 64\]"):
        pack_expert(shape, gate=_random(32, 32), up=_random(32, 64), down=_random(32, 32))
    with pytest.raises(ShapeError, match="lacks gate"):
        pack_expert(shape, gate=None, up=_random(32, 32), down=_random(32, 32))
