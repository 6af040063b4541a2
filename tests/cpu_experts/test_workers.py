"""The number of threads that kernels take: asked and set without numba's locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
from numba.np.ufunc import parallel

from cpu_experts.jit.compiled import kernel
from cpu_experts.jit.workers import use_threads, used_threads

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="numba launches no threads")


@kernel(parallel=True)
def _doubled(x: Any, out: Any) -> None:
    for i in numba.prange(x.size):
        out[i] = 2 * x[i]


@pytest.fixture
def launched() -> Iterator[int]:
    """Numba's threads run, and this thread's number is put back."""
    out = np.zeros(8)
    _doubled(np.ones(8), out)
    before = numba.get_num_threads()
    yield before
    numba.set_num_threads(before)


def test_it_is_numbas_own_number(launched: int) -> None:
    """Told here and seen there, told there and seen here; every thread has its own."""
    use_threads(1)
    assert (numba.get_num_threads(), used_threads()) == (1, 1)
    numba.set_num_threads(launched)
    assert used_threads() == launched
    use_threads(1)
    seen = []
    other = threading.Thread(target=lambda: seen.append(used_threads()))
    other.start()
    other.join()
    assert seen == [numba.config.NUMBA_NUM_THREADS]


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_impossible_numbers_are_refused(launched: int, count: int) -> None:
    """As numba does, and nothing changes."""
    with pytest.raises(ValueError, match="number of threads"):
        use_threads(count)
    assert used_threads() == launched


@pytest.mark.usefixtures("launched")
def test_a_lock_that_an_interrupt_left_taken_stops_nobody() -> None:
    """Another thread still sets its number and computes."""
    found = []

    def work() -> None:
        use_threads(1)
        out = np.zeros(3)
        _doubled(np.ones(3), out)
        found.append((used_threads(), out.tolist()))

    with parallel._backend_init_process_lock:
        other = threading.Thread(target=work, daemon=True)
        other.start()
        other.join(20)
        assert found == [(1, [2.0, 2.0, 2.0])]
