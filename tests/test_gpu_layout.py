"""Layouts, routing tables and errors of the device side, which need no device."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_experts import experts as cpu
from cpu_experts import formats
from gpu_experts import layout as gpu
from gpu_experts.errors import DeviceMemoryError, GpuExpertsError, ShapeError
from gpu_experts.kernels import permute_inputs
from gpu_experts.layout import BlockLayout
from gpu_experts.routing import TILE_ROWS, sort_by_slot


def test_both_sides_agree_on_formats_and_activations() -> None:
    """The two packages know nothing of each other: what they both state is the same."""
    assert tuple(gpu.UNITS) == formats.FORMATS
    assert gpu.ACTIVATIONS == cpu.ACTIVATIONS
    assert (gpu.GROUP, gpu.TILE) == (formats.GROUP, formats.TILE)
    for fmt in gpu.UNITS:
        assert gpu.strip_bytes(77, fmt) == formats.strip_bytes(77, fmt)
        assert (fmt in gpu.QUANTIZED) == formats.is_quantized(fmt)


@given(
    hidden=st.integers(1, 200),
    intermediate=st.integers(1, 200),
    fmt=st.sampled_from(formats.FORMATS),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_a_layout_is_the_packed_blocks(hidden, intermediate, fmt, gated, bias) -> None:
    """Sizes that follow from a layout are those of the packed expert, for any shape."""
    shape = cpu.ExpertShape(
        hidden=hidden, intermediate=intermediate, format=fmt, gated=gated, bias=bias
    )
    made = BlockLayout.of(shape, formats.pad(shape.block_bytes, 4096))
    assert formats.pad(made.block_bytes, 64) == shape.block_bytes
    assert made.up_rows == shape.up_rows
    assert made.padded_intermediate == shape.padded_intermediate
    assert made.parameters == (3 if gated else 2) * hidden * intermediate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "q5_1"}, "unknown weight format 'q5_1'"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"up_strip_bytes": 64}, "a q4_0 strip of 64 inputs takes 576 bytes, up_strip_bytes is 64"),
        ({"down_strip_bytes": 0}, "down_strip_bytes is 0"),
        ({"down_offset": 16}, "down starts at byte 16, inside the 2304 bytes of up"),
        ({"bias": True}, "bias is True, bias_offset is -1"),
        ({"bias": True, "bias_offset": 2304}, "inside down's"),
        ({"stride": 4100}, "stride is 4100, not a multiple of 16"),
        ({"stride": 2304}, "the stride is 2304"),
    ],
)
def test_layouts_that_contradict_themselves(change, message: str) -> None:
    """Every number is checked against the others, and both are named."""
    shape = cpu.ExpertShape(hidden=64, intermediate=32, format="q4_0")
    made = BlockLayout.of(shape, 4096)
    with pytest.raises(ShapeError, match=message):
        replace(made, **change)


def test_errors_carry_hints_and_numbers() -> None:
    """Every error has a hint or None, printed behind the message."""
    error = DeviceMemoryError("no room", asked_bytes=5, free_bytes=3, hint="use less")
    assert isinstance(error, GpuExpertsError)
    assert str(error) == "no room\nhint: use less"
    assert str(ShapeError("bad")) == "bad"
    assert ShapeError("bad").hint is None


def test_importing_the_package_loads_no_framework() -> None:
    """What only asks what a device is starts at once."""
    code = (
        "import sys, gpu_experts, gpu_experts.device, gpu_experts.slots, gpu_experts.layout\n"
        "print(sorted({'torch', 'triton', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@given(
    ids=st.integers(0, 5).flatmap(
        lambda choices: st.lists(
            st.lists(st.integers(-1, 6), min_size=choices, max_size=choices), max_size=90
        ).map(lambda rows: np.array(rows, np.int32).reshape(len(rows), choices))
    )
)
def test_a_routing_table_holds_every_pair_once(ids) -> None:
    """Sorted pairs, runs, the map back and the tiles all say the same as a plain loop."""
    weights = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    routing = sort_by_slot(ids, weights)
    table = torch.from_numpy(routing.table)
    tokens, factors = routing.tokens(table).tolist(), routing.weights(table).tolist()
    pair_of = routing.pair_of(table).reshape(ids.shape).tolist()
    want = sorted(
        (int(slot), token, choice)
        for token, row in enumerate(ids)
        for choice, slot in enumerate(row)
        if slot >= 0
    )
    assert routing.pairs == len(want)
    for pair, (_, token, choice) in enumerate(want):
        assert tokens[pair] == token
        assert factors[pair] == weights[token, choice]
        assert pair_of[token][choice] == pair
    assert sum(pair >= 0 for row in pair_of for pair in row) == len(want)
    assert routing.slot_of(table).tolist() == ids.reshape(-1).tolist()
    assert routing.weight_of(table).tolist() == weights.reshape(-1).tolist()
    covered = []
    for slot, first, count in routing.tile_table(table).reshape(-1, 3).tolist():
        assert 0 < count <= routing.tile_rows
        covered += [(pair, slot) for pair in range(first, first + count)]
    assert covered == [(pair, slot) for pair, (slot, _, _) in enumerate(want)]
    assert [(s, n) for s, _, n in routing.runs] == [
        (slot, sum(s == slot for s, _, _ in want)) for slot in sorted({s for s, _, _ in want})
    ]
    assert routing.largest_load == max((n for _, _, n in routing.runs), default=0)
    assert routing.tile_rows in TILE_ROWS


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize("cols", [128, 256, 32, 100])
def test_permuted_inputs_match_the_words(fmt: str, cols: int) -> None:
    """Input k lies where shifting a packed word of ones-in-one-place brings its weight out."""
    x = torch.arange(1, cols + 1, dtype=torch.float32)[None]
    got = permute_inputs(x, fmt)[0]
    chunks = 4 if fmt == "q4_0" else 8
    assert got.shape == (formats.pad(cols, 128),)
    for k in range(cols):
        group, inner = k % 128 // 32, k % 32
        half, rest = (inner // 16, inner % 16) if fmt == "q4_0" else (0, inner)
        position, chunk = 4 * half + rest % 4, rest // 4
        at = k // 128 * 128 + position * 4 * chunks + group * chunks + chunk
        assert got[at] == k + 1
    assert got.count_nonzero() == cols
