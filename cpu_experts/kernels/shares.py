"""How threads share out a run of items: large shares first, small ones at the end.

A thread that reads on where it has just read is faster than one that begins elsewhere: the
processor's own prefetching has found the row, and ours has it covered. Equal small shares begin
anew all the time, equal large ones let the last thread keep the others waiting. So the threads
take half of what is left between them, round after round, down to the least share that is worth
a counter's turn.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from cpu_experts.jit.compiled import kernel


@kernel()
def share(number, count, least, threads):
    """Return the first item of a share, and the one behind its last; ``count`` twice behind all.

    There are :func:`shares` of ``count`` items: of at least ``least``, but for the last.
    """
    begin, left = np.int64(0), count
    while left > 0:
        size = max(least, left // (2 * threads))
        if number < threads:
            first = min(begin + number * size, count)
            return first, min(first + size, count)
        number -= threads
        begin += threads * size
        left = count - begin
    return count, count


@kernel()
def shares(count, least, threads):
    """Return how many shares there are of ``count`` items, see :func:`share`."""
    found, left = np.int64(0), count
    while left > 0:
        size = max(least, left // (2 * threads))
        found += min(threads, -(-left // size))
        left -= threads * size
    return found
