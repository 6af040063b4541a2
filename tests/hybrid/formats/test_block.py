"""Blocks: where an expert's parts lie, and what no block can be."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.formats.block import Block, pack_expert, unpack_expert
from hybrid.formats.errors import FormatError, HybridError, ShapeError
from hybrid.formats.matrix import pack, packed_bytes, unpack
from hybrid.formats.registry import FORMATS, bits_per_weight
from hybrid.formats.strips import pad

shapes = st.builds(
    Block,
    hidden=st.integers(1, 200),
    intermediate=st.integers(1, 200),
    format=st.sampled_from(list(FORMATS)),
    down_format=st.sampled_from(["", *FORMATS]),
    gated=st.booleans(),
    bias=st.booleans(),
)


@given(shape=shapes)
def test_parts_lie_behind_each_other(shape: Block) -> None:
    """Up, down and the biases do not overlap, start on cache lines and fill the block."""
    rows, sides = pad(shape.intermediate, 32), 2 if shape.gated else 1
    assert shape.up_bytes == packed_bytes(rows * sides, shape.hidden, shape.format)
    assert shape.up_bytes == shape.up_rows // 16 * shape.up_strip_bytes
    assert shape.down_bytes == pad(shape.hidden, 16) // 16 * shape.down_strip_bytes
    ends = [shape.up_bytes, shape.down_offset + shape.down_bytes]
    starts = [shape.down_offset, shape.bias_offset]
    if shape.bias:
        assert shape.down_bias_offset == shape.bias_offset + 4 * shape.up_rows
        ends.append(shape.down_bias_offset + 4 * pad(shape.hidden, 16))
        starts.append(shape.block_bytes)
    assert starts == [pad(end, 64) for end in ends]
    assert starts[-1] == shape.block_bytes
    assert shape.parameters == (1 + sides) * shape.hidden * shape.intermediate


def test_a_stride_says_where_experts_lie_and_not_how() -> None:
    """The same expert by itself and in a store has the same bytes, and is another value."""
    shape = Block(hidden=40, intermediate=33, format="q8_0")
    stored = shape.with_stride(12288)
    assert (stored.stride, stored.block_bytes) == (12288, shape.block_bytes)
    assert stored != shape
    assert stored == replace(shape, stride=12288)
    draw = np.random.default_rng(0)
    up = draw.standard_normal((2, 33, 40)).astype(np.float32)
    parts = {"gate": up[0], "up": up[1], "down": np.ascontiguousarray(up[0].T)}
    np.testing.assert_array_equal(pack_expert(shape, **parts), pack_expert(stored, **parts))


def test_down_may_have_a_format_of_its_own() -> None:
    """Named only where it differs: the same experts are equal however they were asked for."""
    shape = Block(hidden=256, intermediate=256, format="q4_k", down_format="q6_k")
    assert (shape.formats, shape.format_name) == (("q4_k", "q6_k"), "q4_k+q6_k")
    assert shape.down_bytes == packed_bytes(256, 256, "q6_k")
    assert replace(shape, down_format="q4_k") == replace(shape, down_format="")
    draw = np.random.default_rng(0).standard_normal((3, 256, 256)).astype(np.float32)
    found = unpack_expert(shape, pack_expert(shape, gate=draw[0], up=draw[1], down=draw[2]))
    for got, w, fmt in zip(found[:3], draw, ("q4_k", "q4_k", "q6_k"), strict=True):
        np.testing.assert_array_equal(got, unpack(pack(w, fmt), 256, 256, fmt))
    assert bits_per_weight("q4_k+q6_k") == pytest.approx((2 * 4.625 + 6.5625) / 3)


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_a_block_that_was_used_can_be_copied(fmt: str) -> None:
    """Its format's functions may be no module's: a pickle names the format."""
    shape = Block(hidden=64, intermediate=32, format=fmt)
    assert shape.packing is FORMATS[fmt]
    for twin in (pickle.loads(pickle.dumps(shape)), copy.deepcopy(shape)):
        assert twin == shape
        assert twin.packing is FORMATS[fmt]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "q5_9"}, FormatError, "unknown weight format 'q5_9'"),
        ({"down_format": "q9"}, FormatError, "unknown weight format 'q9'"),
        ({"activation": "swish"}, ShapeError, "unknown activation 'swish'"),
        ({"hidden": 0}, ShapeError, "an expert of 0 x 32 has no weights"),
        ({"stride": 4100}, ShapeError, "stride is 4100, not a multiple of 16"),
        ({"stride": 2304}, ShapeError, "a block takes 3456 bytes, the stride is 2304"),
    ],
)
def test_blocks_that_cannot_be(
    change: dict[str, Any], error: type[HybridError], message: str
) -> None:
    """Every refusal names what is wrong, and both numbers where two contradict each other."""
    with pytest.raises(error, match=message):
        replace(Block(hidden=64, intermediate=32, format="q4_0", stride=4096), **change)
