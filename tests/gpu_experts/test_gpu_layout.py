"""Routing tables, the order of inputs and errors of the device side, which need no device."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_experts.cuda.kernels import permute_inputs
from gpu_experts.errors import DeviceMemoryError, GpuExpertsError, ShapeError
from gpu_experts.routing import TILE_ROWS, VECTOR_LOAD, sort_by_slot
from hybrid.formats.strips import pad


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
        "import sys, gpu_experts, gpu_experts.device\n"
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
    assert got.shape == (pad(cols, 128),)
    for k in range(cols):
        group, inner = k % 128 // 32, k % 32
        half, rest = (inner // 16, inner % 16) if fmt == "q4_0" else (0, inner)
        position, chunk = 4 * half + rest % 4, rest // 4
        at = k // 128 * 128 + position * 4 * chunks + group * chunks + chunk
        assert got[at] == k + 1
    assert got.count_nonzero() == cols
