"""Layouts, routing tables and errors of the device side, which need no device."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_experts import experts as cpu
from cpu_experts import formats
from gpu_experts import layout as gpu
from gpu_experts.cuda.kernels import permute_inputs
from gpu_experts.errors import DeviceMemoryError, GpuExpertsError, ShapeError
from gpu_experts.layout import BlockLayout
from gpu_experts.routing import TILE_ROWS, VECTOR_LOAD, sort_by_slot


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
            st.lists(st.integers(-1, 3), min_size=choices, max_size=choices), max_size=90
        ).map(lambda rows: np.array(rows, np.int32).reshape(len(rows), choices))
    )
)
def test_a_routing_table_holds_every_pair_once(ids) -> None:
    """Sorted pairs, runs, users and tiles all say the same as a plain loop."""
    weights = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    routing = sort_by_slot(ids, weights)
    table = torch.from_numpy(routing.table)
    want = [
        (int(slot), token, choice)
        for token, row in enumerate(ids)
        for choice, slot in enumerate(row)
        if slot >= 0
    ]
    if len(ids) != 1:  # one token's pairs stay as they are
        want.sort()
    loads = Counter(slot for slot, _, _ in want)
    users = sorted({token for _, token, _ in want})
    assert (routing.pairs, routing.users) == (len(want), len(users))
    assert routing.slot_of(table).tolist() == [slot for slot, _, _ in want]
    assert routing.token_of(table).tolist() == users
    assert [users[user] for user in routing.user_of(table)] == [token for _, token, _ in want]
    assert routing.weight_of(table).tolist() == [weights[token, at] for _, token, at in want]
    begin, by_user = routing.begin_of(table).tolist(), routing.by_user(table).tolist()
    assert [
        [want[pair] for pair in by_user[begin[at] : begin[at + 1]]] for at in range(len(users))
    ] == [
        [(int(slot), token, choice) for choice, slot in enumerate(ids[token]) if slot >= 0]
        for token in users
    ]
    assert len(by_user) == len(want)
    assert [
        (pair, slot) for slot, first, count in routing.runs for pair in range(first, first + count)
    ] == [(pair, slot) for pair, (slot, _, _) in enumerate(want)]
    if len(ids) != 1:
        assert [(slot, count) for slot, _, count in routing.runs] == sorted(loads.items())
        assert routing.largest_load == max(loads.values(), default=0)
    tiles = routing.tile_table(table).reshape(-1, 3).tolist()
    assert len(tiles) == routing.tiles
    covered = [(pair, slot) for slot, first, count in tiles for pair in range(first, first + count)]
    if routing.largest_load <= VECTOR_LOAD:
        assert covered == []
    else:
        assert covered == [(pair, slot) for pair, (slot, _, _) in enumerate(want)]
        assert all(0 < count <= routing.tile_rows for _, _, count in tiles)
        assert routing.tile_rows in TILE_ROWS
        assert routing.tile_rows >= min(routing.largest_load, TILE_ROWS[-1])


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
