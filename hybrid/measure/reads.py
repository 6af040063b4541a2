"""What measuring kernels rests on: experts in memory, and how fast memory is read."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_experts.kernels.reading import read_words
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.strips import pad
from hybrid.weights.huge_pages import large_pages
from planner.describe.bandwidth import exceeds

#: No cache holds so much.
ROTATION_BYTES = 1 << 30
_PAGE = 4096


def read_seconds(words: NDArray[np.uint64], threads: int) -> float:
    """Return how long all of ``threads`` take to read ``words`` once."""
    start = time.perf_counter()
    read_words(words, threads)
    return time.perf_counter() - start


def shares_of_bandwidth(
    rates: Sequence[float], reads: Sequence[float]
) -> tuple[list[float], float | None]:
    """Return which shares of the bandwidth ``rates`` are, never more than 1.

    Parameters
    ----------
    rates
        Bytes a second of what is measured.
    reads
        What plain reads beside each of them reached.

    Returns
    -------
    The shares: of the read beside it, for a machine's speed drifts. Where one is faster than that,
    plain reads do not show the bandwidth; then all are of the fastest of all these rates, which
    comes second.
    """
    if any(exceeds(rate, read) for rate, read in zip(rates, reads, strict=True)):
        most = max(*rates, *reads)
        return [rate / most for rate in rates], most
    return [min(1.0, rate / read) for rate, read in zip(rates, reads, strict=True)], None


def fill(shape: Block, experts: int) -> NDArray[np.uint8]:
    """Random experts ``[layers * experts, stride]``, at least ``ROTATION_BYTES`` in all.

    Where the store's are in memory: on whole pages, large ones where the system has them.
    """
    rng = np.random.default_rng(0)
    f, d = shape.intermediate, shape.hidden
    gate, up, down = (
        rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        for size in ((f, d), (f, d), (d, f))
    )
    one = pack_expert(shape, gate=gate, up=up, down=down)
    stride = pad(shape.block_bytes, _PAGE)
    layers = -(-ROTATION_BYTES // (experts * stride))
    memory = np.frombuffer(large_pages(layers * experts * stride), np.uint8)
    blocks = memory[: layers * experts * stride].reshape(layers * experts, stride)
    blocks[:, : one.size] = one
    blocks[:, one.size :] = 0
    return blocks
