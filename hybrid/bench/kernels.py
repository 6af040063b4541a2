"""Measures the expert kernels beside the machine's read bandwidth (``hybrid bench kernels``).

Experts come from memory, not from a cache: at least ``ROTATION_BYTES`` of them take turns,
and every call draws other experts than the one before. Streaming reads of the same memory
come between the calls, so that ratios compare neighbours in time on a machine whose speed
drifts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from cpu_experts.ffn import run_experts
from cpu_experts.jit.workers import use_threads, used_threads
from hybrid.bench.record import Told, provenance, spread, untold
from hybrid.formats.block import Block
from hybrid.machine import host
from hybrid.measure.reads import fill, read_seconds, shares_of_bandwidth


class Case(NamedTuple):
    """One layer's shape and one load: ``tokens`` spread uniformly over the experts."""

    format: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int


SHAPES = ((2048, 768, 128, 8), (4096, 14336, 8, 2))
TOKENS = (1, 4, 16, 32, 128, 512)


def cases(formats: tuple[str, ...] = ("q4_0", "q8_0")) -> list[Case]:
    """Return every case measured by default: all token counts on the first shape."""
    many = [Case(f, *SHAPES[0], tokens) for f in formats for tokens in TOKENS]
    return many + [Case(f, *SHAPES[1], 1) for f in formats]


def _calls(
    case: Case, blocks: NDArray[np.uint8], shape: Block
) -> Iterator[tuple[Callable[[], None], int]]:
    """Yield calls on ever other layers and experts, and how many experts each one reads."""
    rng = np.random.default_rng(1)
    layers = len(blocks) // case.experts
    x = rng.standard_normal((case.tokens, case.hidden), dtype=np.float32)
    out = np.zeros_like(x)
    weights = np.full((case.tokens, case.top_k), 1 / case.top_k, np.float32)
    order: list[int] = []
    at = 0
    while True:
        layer = blocks[at % layers * case.experts :][: case.experts]
        if case.tokens * case.top_k <= case.experts:
            # A few experts a call: deal all of the layer's out before any comes again.
            need = case.tokens * case.top_k
            if len(order) < need:
                order = list(rng.permutation(case.experts))
            ids = np.array([order.pop() for _ in range(need)]).reshape(case.tokens, case.top_k)
        else:
            scores = rng.random((case.tokens, case.experts))
            ids = np.argsort(scores, axis=1)[:, : case.top_k]
        active = len(np.unique(ids))
        yield partial(run_experts, x, ids, weights, layer, shape, out), active
        at += 1


def run(
    chosen: list[Case],
    *,
    repeat: int = 30,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure ``chosen`` cases and return one record.

    Parameters
    ----------
    repeat
        Timed calls a case; every ten of them begin with a streaming read of all of the
        experts' memory.
    threads
        Threads for kernels and reads; as many as numba has by default.
    progress
        Called with a line about what is measured next.
    finished
        Called with the record so far and a line after every case.

    Returns
    -------
    ``read_bandwidth_bytes_per_s`` (median over all reads, or what kernels reached beyond them) and
    ``results``, a dict per case: the case's fields, ``seconds_median`` with quartiles and samples,
    ``bytes_per_s`` of expert weights, ``read_fraction`` as of :func:`shares_of_bandwidth`, and
    ``gflops``.

    Raises
    ------
    UsageError
        When there are not that many threads.
    """
    if threads is not None:
        host.check_threads(threads, numba.config.NUMBA_NUM_THREADS)
        use_threads(threads)
    threads = used_threads()
    about = provenance("hybrid bench kernels", threads)
    result: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    all_reads: list[float] = []
    reached: float | None = None
    memory: tuple[Any, ...] = ()
    blocks = np.empty((0, 0), np.uint8)
    for case in chosen:
        shape = Block(hidden=case.hidden, intermediate=case.intermediate, format=case.format)
        if memory != (shape, case.experts):
            progress(f"filling experts {case.hidden} x {case.intermediate} {case.format}")
            memory, blocks = (shape, case.experts), fill(shape, case.experts)
        progress(" ".join(f"{k}={v}" for k, v in case._asdict().items()))
        words = blocks.reshape(-1).view(np.uint64)
        calls = _calls(case, blocks, shape)
        for _ in range(3):
            next(calls)[0]()
        read_seconds(words, threads)
        samples: list[float] = []
        rates: list[float] = []
        reads: list[float] = []
        for i in range(repeat):
            if i % 10 == 0:
                reads.append(words.nbytes / read_seconds(words, threads))
            call, active = next(calls)
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
            rates.append(active * shape.block_bytes / samples[-1])
        all_reads += reads
        matrices = 3 if shape.gated else 2
        flops = 2 * matrices * case.hidden * case.intermediate * case.tokens * case.top_k
        bytes_per_s = median(rates)
        results.append(
            case._asdict()
            | spread(samples)
            | {
                "bytes_per_s": bytes_per_s,
                "gflops": flops / median(samples) / 1e9,
                "reads_bytes_per_s": reads,
            }
        )
        shares, reached = shares_of_bandwidth(
            [row["bytes_per_s"] for row in results],
            [median(row["reads_bytes_per_s"]) for row in results],
        )
        for row, share in zip(results, shares, strict=True):
            row["read_fraction"] = share
        result = about | {
            "read_bandwidth_bytes_per_s": median(all_reads) if reached is None else reached,
            "results": results,
        }
        finished(result, _in_words(results[-1]))
    if reached is not None:
        progress(f"experts are read faster than plain reads: {reached / 1e9:.1f} GB/s it is then")
    return result


def _in_words(row: dict[str, Any]) -> str:
    return (
        f"{row['hidden']} x {row['intermediate']} {row['format']}, {row['tokens']} tokens: "
        f"{row['seconds_median'] * 1e3:.2f} ms, {row['bytes_per_s'] / 1e9:.1f} GB/s "
        f"({row['read_fraction']:.2f} of read), {row['gflops']:.0f} GFLOP/s"
    )


def kernels_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    head = f"{'format':<7}{'D':>6}{'F':>7}{'E':>5}{'A':>3}{'tokens':>8}"
    lines = [
        f"read bandwidth {result['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s,"
        f" {result['threads']} threads, {result['machine']['simd_level']}",
        f"{head}{'ms':>9}{'GB/s':>8}{'of read':>9}{'GFLOP/s':>9}",
    ]
    for row in result["results"]:
        lines.append(
            f"{row['format']:<7}{row['hidden']:>6}{row['intermediate']:>7}{row['experts']:>5}"
            f"{row['top_k']:>3}{row['tokens']:>8}{row['seconds_median'] * 1e3:>9.2f}"
            f"{row['bytes_per_s'] / 1e9:>8.1f}{row['read_fraction']:>9.2f}{row['gflops']:>9.0f}"
        )
    return "\n".join(lines)
