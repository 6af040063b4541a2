"""Devices whose slots hold stamps instead of experts, and programs that copy and compute there."""

from __future__ import annotations

import time

import numpy as np
import torch
from hypothesis import strategies as st

from fake_cuda import FakeRuntime
from gpu_experts.cuda.device import CudaDevice
from gpu_experts.device import Device
from naive_gpu import Compute, Copy, small_layout

SLOTS = 3


def stamp(number: int) -> np.ndarray:
    """A block that says its number in every byte."""
    return np.full(small_layout().block_bytes, number, np.uint8)


def add_stamps(x, slot_ids, routing_weights, slots, layout, out) -> None:
    """In place of experts: add what the slots hold, when reading starts and when it ends."""
    before = slots[slot_ids[slot_ids >= 0]].copy()
    time.sleep(0.0005)
    after = slots[slot_ids[slot_ids >= 0]]
    np.testing.assert_array_equal(before, after, "a slot was overwritten while it was read")
    for token, row in enumerate(slot_ids):
        for choice, slot in enumerate(row):
            if slot >= 0:
                out[token] += routing_weights[token, choice] * slots[slot, 0]


def run_stamps(x, routing, table, slots, layout, out, implementation) -> None:
    """The same in place of the CUDA device's kernels, at once."""
    tokens = routing.token_of(table)[routing.user_of(table)]
    seen = slots[:, 0][routing.slot_of(table).long()].float() * routing.weight_of(table)
    out.index_add_(0, tokens, seen[:, None].expand(-1, out.shape[1]))


def cuda_device(runtime: FakeRuntime | None = None, slots: int = SLOTS, **options) -> CudaDevice:
    """An open device over the stand-in for torch.cuda."""
    made = CudaDevice(runtime=runtime or FakeRuntime(), **options)
    made.open(small_layout(), slots)
    return made


def call(target: Device, slots, what: str = "compute", after=()):
    """One token to each of ``slots``, with weights 1, 256, ...; the output and its event."""
    out = target.new_output(1)
    ids = np.array([list(slots)], np.int32).reshape(1, -1)
    weights = (256.0 ** np.arange(ids.size, dtype=np.float32))[None]
    return out, target.compute(torch.zeros(1, 4), ids, weights, out, after, what)


def programs(blocks: int = 250):
    """Copies and computes in any order, slots filled before they are read."""
    fill = [Copy(slot, slot) for slot in range(SLOTS)]
    slot = st.integers(0, SLOTS - 1)
    steps = st.one_of(
        st.builds(Copy, st.integers(0, blocks), slot),
        st.builds(Compute, st.lists(slot, min_size=1, max_size=2).map(tuple)),
    )
    return st.lists(steps, max_size=12).map(lambda rest: [*fill, *rest])
