"""How threads share out a run of items."""

from __future__ import annotations

import numpy as np
import pytest

from cpu_experts.kernels.shares import share, shares


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 1000])
@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 9496])
def test_shares_are_all_items_once_and_in_order(count: int, least: int, threads: int) -> None:
    """The shares follow one another, none is empty, and behind them there is nothing."""
    given = [np.int64(number) for number in (count, least, threads)]
    found = shares(*given)
    spans = [share(np.int64(number), *given) for number in range(found)]
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])][:found]
    assert all(first < last for first, last in spans)
    assert (spans[-1][1] if spans else 0) == count
    for number in range(found, found + 2 * threads + 1):
        assert share(np.int64(number), *given) == (count, count)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_shares_shrink_to_the_least(threads: int) -> None:
    """Threads that are equally fast read long rows first and end within a least share."""
    count, least = 9496, 2
    given = np.int64(count), np.int64(least), np.int64(threads)
    spans = [share(np.int64(number), *given) for number in range(shares(*given))]
    sizes = [last - first for first, last in spans]
    assert sizes[0] == count // (2 * threads)
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes[:-1]) == least
    assert len(sizes) < 16 * threads
    done = np.zeros(threads)
    for size in sizes:
        done[done.argmin()] += size
    assert done.max() - done.min() <= least
