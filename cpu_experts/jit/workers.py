"""How many threads the kernels take: numba's number, of which every thread has its own.

Numba's own functions for it take locks of the whole process on every call, to launch its threads
if they are not. An interrupt that strikes there leaves them taken for good: whoever asks next from
another thread waits for ever. So once they are launched, what is below those functions is asked.
"""

from __future__ import annotations

import threading

import numba
from numba.np.ufunc import parallel

#: Held by whoever runs a kernel: the thread layers that numba offers on all platforms do not allow
#: two parallel regions at once.
LOCK = threading.Lock()


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
