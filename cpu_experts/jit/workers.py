"""How many threads the kernels take: numba's number, of which every thread has its own.

Numba's own functions for it take locks of the whole process on every call, to launch its threads
if they are not. An interrupt that strikes there leaves them taken for good: whoever asks next from
another thread waits for ever. So once they are launched, what is below those functions is asked.
"""

from __future__ import annotations

import numba
from numba.np.ufunc import parallel

from cpu_experts.errors import BackendError
from cpu_experts.jit.turns import Turn


class _Region(Turn):
    """A lock for kernels, which says no in a child that was forked after their threads started.

    The threads stay behind in the parent, with whatever they held. GNU's OpenMP would wait for
    them, and numba ends the process instead.
    """

    left_behind = False

    def renewed_in_child(self) -> None:
        """Remember whether there were threads."""
        self.left_behind = self.left_behind or bool(parallel._is_initialized)

    def __enter__(self) -> None:
        if self.left_behind:
            raise BackendError(
                "this process was forked from one that had used the kernels, whose threads stayed "
                "there",
                hint="start workers with spawn: multiprocessing.get_context('spawn'), or "
                "DataLoader(multiprocessing_context='spawn')",
            )
        super().__enter__()


#: Held by whoever runs a kernel: the thread layers that numba offers on all platforms do not allow
#: two parallel regions at once.
LOCK = _Region()


def kernels_run() -> bool:
    """Whether kernels can run here: not in a child forked from a process that had used them."""
    return not LOCK.left_behind


def use_threads(count: int) -> None:
    """Have the kernels that this thread calls take ``count`` threads.

    Raises
    ------
    ValueError
        When ``count`` is below 1 or above ``numba.config.NUMBA_NUM_THREADS``.
    """
    if parallel._is_initialized and 1 <= count <= numba.config.NUMBA_NUM_THREADS:
        parallel._set_num_threads(count)
    else:
        numba.set_num_threads(count)


def used_threads() -> int:
    """Return how many threads the kernels that this thread calls take."""
    if parallel._is_initialized:
        return int(parallel._get_num_threads())
    return int(numba.get_num_threads())
