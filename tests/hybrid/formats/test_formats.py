"""Weight formats: the same numbers as GGUF's, in the layout the kernels expect."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import naive
import naive_formats
from hybrid.formats import q4_0, q8_0
from hybrid.formats.activations import quantize_activations, round_activations
from hybrid.formats.bf16 import from_bf16, to_bf16
from hybrid.formats.block import Block, pack_expert, unpack_expert
from hybrid.formats.errors import FormatError, ShapeError
from hybrid.formats.matrix import from_gguf, pack, packed_bytes, unpack, unpack_rows
from hybrid.formats.registry import FORMATS, format_of

LEGACY = ("q4_0", "q8_0")
GGUF = {
    name: gguf.GGMLQuantizationType[name.upper()]
    for name, known in FORMATS.items()
    if known.repack is not None
}
QUANTIZED = [name for name, known in FORMATS.items() if known.quantized]
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
def test_blocks_of_gguf_keep_every_bit(fmt: str) -> None:
    """Whatever bytes a file has, ours hold what GGUF's library reads there; rows, too."""
    inputs, size = gguf.GGML_QUANT_SIZES[GGUF[fmt]]
    raw = np.random.default_rng(1).integers(0, 256, (37, 512 // inputs * size), np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, GGUF[fmt])
        packed = from_gguf(raw, fmt)
        ours = unpack(packed, 37, 512, fmt)
        some = unpack_rows(packed, 512, fmt, np.array([36, 1, 17]))
    assert packed.size == packed_bytes(37, 512, fmt)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(some, theirs[[36, 1, 17]])


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_layouts_one_weight_at_a_time(fmt: str) -> None:
    """Every weight of a strip is where its naive twin finds it."""
    known = FORMATS[fmt]
    packed = pack(_random(16, 2 * known.unit_inputs), fmt)
    assert known.unit_bytes == naive_formats.unit_bytes(fmt)
    want = [
        [naive_formats.weight(fmt, unit.tobytes(), row, k) for k in range(known.unit_inputs)]
        for row in range(16)
        for unit in packed.reshape(2, -1)
    ]
    got = unpack(packed, 16, 2 * known.unit_inputs, fmt)
    np.testing.assert_allclose(got, np.reshape(want, got.shape), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_of_zero_are_weights_of_zero(fmt: str) -> None:
    """What padding and whoever fills a block up relies on."""
    empty = np.zeros(packed_bytes(16, 256, fmt), np.uint8)
    assert not unpack(empty, 16, 256, fmt).any()
    assert not unpack(pack(np.zeros((16, 256), np.float32), fmt), 16, 256, fmt).any()


@pytest.mark.parametrize(
    ("fmt", "most"),
    [
        ("q4_0", 0.0875), ("q4_1", 0.073), ("q4_k", 0.074), ("iq4_nl", 0.079), ("iq4_xs", 0.08),
        ("mxfp4", 0.115), ("nvfp4", 0.092), ("q5_0", 0.042), ("q5_1", 0.0355), ("q5_k", 0.0375),
        ("q6_k", 0.0185), ("q3_k", 0.157), ("q2_k", 0.29), ("q8_0", 0.0056),
        ("int4_32", 0.083), ("int4_64", 0.093), ("int4_128", 0.102), ("int4_256", 0.11),
        ("nf4", 0.093),
    ],
)  # fmt: skip
def test_error_of_normal_weights(fmt: str, most: float) -> None:
    """Root mean square, relative to the weights': searching for scales keeps what it gains."""
    w = _random(64, 512)
    error = unpack(pack(w, fmt), 64, 512, fmt) - w
    assert np.sqrt(np.mean(error**2) / np.mean(w**2)) < most


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_what_a_format_holds_is_packed_without_loss_of_scale(fmt: str) -> None:
    """Weights of all sizes that half precision knows keep their relative error."""
    w = _random(16, 256)
    for size in (1e-3, 30.0):
        small, one = (unpack(pack(v, fmt), 16, 256, fmt) for v in (w * np.float32(size), w))
        assert np.abs(small / size - one).max() < 0.35 * np.abs(w).max()


@pytest.mark.parametrize("fmt", LEGACY)
def test_values_equal_gguf_bit_for_bit(fmt: str) -> None:
    """Packing and unpacking gives exactly what ggml's quantizer gives, zero groups included."""
    w = _random(48, 320)
    w[0, :32] = 0
    w[1] *= 1e-6
    w[2] *= 3000
    theirs = gguf.quants.dequantize(gguf.quants.quantize(w, GGUF[fmt]), GGUF[fmt])
    np.testing.assert_array_equal(unpack(pack(w, fmt), 48, 320, fmt), theirs)


@pytest.mark.parametrize("fmt", LEGACY)
@given(w=matrices)
@settings(max_examples=60, deadline=None)
def test_codes_equal_naive(fmt: str, w: np.ndarray) -> None:
    """The vectorised quantizers agree with loops over single values."""
    ours, one = QUANTIZERS[fmt]
    found = ours(w.reshape(len(w), -1, 1, 32))
    codes = found.codes.view(np.int8)[:, :, 0]
    for row in range(w.shape[0]):
        for g in range(w.shape[1] // 32):
            want, d = one(w[row, 32 * g : 32 * g + 32])
            assert list(codes[row, g]) == want
            assert found.scales[0][row, g] == d


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
    padded = np.zeros((rows, -(-cols // 256) * 256), np.float32)
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
    with pytest.raises(FormatError, match="'q5_9'") as caught:
        format_of("q5_9")
    assert "q4_0" in str(caught.value.hint)
    with pytest.raises(ShapeError, match="float64"):
        pack(np.zeros((16, 32)), "q4_0")
    with pytest.raises(FormatError, match=r"takes 288 bytes, the buffer has 10"):
        unpack(np.zeros(10, np.uint8), 16, 32, "q4_0")
    with pytest.raises(FormatError, match="1 of 512 weights are infinite or NaN"):
        pack(np.where(np.arange(512) == 7, np.float32(np.inf), 1).reshape(16, 32), "q8_0")
    with pytest.raises(FormatError, match=r"weights up to 1e\+09 have no fp16 scale in q8_0"):
        pack(np.full((16, 32), 1e9, np.float32), "q8_0")
    with pytest.raises(ShapeError, match=r"multiple of 144\], got uint8 \[2, 145\]"):
        from_gguf(np.zeros((2, 145), np.uint8), "q4_k")
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    with pytest.raises(ShapeError, match=r"up is float32 \[32, 64\]"):
        pack_expert(shape, gate=_random(32, 32), up=_random(32, 64), down=_random(32, 32))
    with pytest.raises(ShapeError, match="lacks gate"):
        pack_expert(shape, gate=None, up=_random(32, 32), down=_random(32, 32))
