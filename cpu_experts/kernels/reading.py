"""Reading memory by the kernels' own loads: what their bandwidth is measured against."""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.micro import READ_WORDS, fetch_add, sum_words

#: Words that a thread takes at a time: 1 MiB.
_BLOCK = np.int64(1 << 17)


@kernel()
def _read_items(counter, words, total):
    """Take blocks of ``words``, and add up what they hold."""
    found = np.uint64(0)
    block = fetch_add(counter, np.int64(0))
    while block * _BLOCK < words.size:
        following = fetch_add(counter, np.int64(0))
        start, end = block * _BLOCK, min((block + 1) * _BLOCK, words.size)
        whole = (end - start) // READ_WORDS * READ_WORDS
        if whole:
            found += sum_words(words, start, whole)
        rest = words[start + whole : end]
        for i in range(rest.size):
            found += rest[i]
        block = following
    total[0] = found


@kernel(parallel=True)
def _read(counter, words, totals, threads):
    counter[:] = 0
    for w in prange(threads):
        _read_items(counter, words, totals[w])


def read_words(words: NDArray[np.uint64], threads: int) -> int:
    """Read ``words`` (flat) once, every thread taking blocks in turn; return their sum.

    The sum is of 64 bits: what is above them is lost.
    """
    counter, totals = np.zeros(1, np.int64), np.zeros((threads, 16), np.uint64)
    _read(counter, words, totals, threads)
    return int(totals[:, 0].sum())
