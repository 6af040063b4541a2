"""What this machine does in a second: reads, routed experts of any load, reads from the disk.

Every function returns samples in seconds or rates, and takes the clock's word for it; what they
mean to the planner is made of them in :mod:`hybrid.measure.calibrate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_experts.ffn import run_experts
from hybrid.errors import UsageError
from hybrid.formats.block import Block
from hybrid.formats.strips import F32
from hybrid.measure.interference import Others, Turns
from hybrid.measure.reads import fill, read_seconds
from hybrid.measure.terms_of_step import typical
from hybrid.packed.bf16_products import least_load, offered
from hybrid.packed.experts import BareLayer, LayerExperts, compute_on_cpu
from hybrid.weights.store import U8

Run = Callable[[Tensor, Tensor, Tensor], object]
"""Computes one layer's experts: hidden states ``[T, D]``, ids and routing weights ``[T, A]``."""

RunSingle = Callable[[F32, NDArray[np.int64], F32], object]
"""The same of arrays, as whatever places experts calls them."""

LOADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_MOST_TOKENS = 512
_TURNS = 6
"""Turns that nobody disturbed, and a third of all at most."""
_COUNTS = (1, 2, 4, 8)
"""Experts in calls of a single token."""
_SHORT_CALLS = 12
"""Calls of each of those in every turn."""
_READ_BYTES = 1 << 30
_READS = 8
"""Reads that nobody disturbed."""
_DISK_BYTES = 1 << 28
_DISK_BLOCK = 1 << 22
_DISK_PAGE = 4096


class Budget:
    """Time that measuring may take; what would exceed it is left out.

    Parameters
    ----------
    limit_s
        All of it.
    clock
        Returns seconds; everything is timed with it.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.now_s = clock
        self._end_s = clock() + limit_s

    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end_s - self.now_s()

    def part(self, share: float) -> Budget:
        """A budget of ``share`` of what is left."""
        return Budget(max(0.0, self.left_s()) * share, self.now_s)

    def repeat(self, measure: Callable[[], float], least: int, most: int) -> list[float]:
        """Call ``measure`` ``most`` times, or as often as time allows, ``least`` times anyway.

        Returns the seconds that it returns. The first call is not among them if there are more.
        """
        found = [measure()]
        while len(found) <= most and (len(found) < least or self.left_s() > max(found)):
            found.append(measure())
        return found[1:] or found


@dataclass
class ExpertTimes:
    """What a layer's routed experts took on the CPU.

    Attributes
    ----------
    shape
        Which experts.
    start_s
        Samples of what a call takes besides its experts.
    loads
        Load to samples of the seconds that one expert with so many tokens adds.
    panels
        The same by torch's bfloat16 products, where the processor has instructions for them.
    disturbed
        Part of the processors' time that other programs took meanwhile.
    """

    shape: Block
    start_s: list[float] = field(default_factory=list)
    loads: dict[int, list[float]] = field(default_factory=dict)
    panels: dict[int, list[float]] = field(default_factory=dict)
    disturbed: float = 0.0

    def panels_from(self) -> int | None:
        """The load from which those are faster; None is never."""
        kernels, panels = (
            {load: float(median(samples)) for load, samples in found.items()}
            for found in (self.loads, self.panels)
        )
        return least_load(kernels, panels)

    def joined(self, later: ExpertTimes) -> ExpertTimes:
        """Return both measurements' samples."""

        def both(
            mine: Mapping[int, list[float]], theirs: Mapping[int, list[float]]
        ) -> dict[int, list[float]]:
            loads = sorted({*mine, *theirs})
            return {load: [*mine.get(load, ()), *theirs.get(load, ())] for load in loads}

        return ExpertTimes(
            self.shape,
            [*self.start_s, *later.start_s],
            both(self.loads, later.loads),
            both(self.panels, later.panels),
            fmean((self.disturbed, later.disturbed)),
        )


def expert_times(
    runs: Sequence[Run],
    shape: Block,
    experts: int,
    top_k: int,
    budget: Budget,
    *,
    single: Sequence[RunSingle],
    others: Others | None = None,
) -> ExpertTimes:
    """Measure calls with equal loads, on ever other layers and experts.

    Parameters
    ----------
    runs
        Each layer's experts.
    shape, experts, top_k
        Of every layer.
    budget
        Larger loads are left out when it is used up; the first always is measured.
    single
        Each layer's experts as they are called for a single token.
    others
        Tells which turns to leave out.

    Notes
    -----
    A call of n experts of a single token takes ``start + n * each``: calls of 1, 2, 4 and 8, one
    right after the other, tell the two apart, for the start is a large part of the shortest. The
    other loads follow from the start that is known then. Loads take turns, so that a moment's
    disturbance is one sample of many loads and not all of one's; turns that other programs
    disturbed are taken again while there is time.
    """
    rng = np.random.default_rng(0)
    calls = 0

    def timed(run: Callable[[], object]) -> float:
        start_s = budget.now_s()
        run()
        return budget.now_s() - start_s

    def one_token(count: int) -> float:
        nonlocal calls
        calls += 1
        ids = rng.permutation(experts)[:count].reshape(1, count)
        x = rng.standard_normal((1, shape.hidden), dtype=np.float32)
        weights = np.full(ids.shape, 1 / count, np.float32)
        return timed(partial(single[calls % len(single)], x, ids, weights))

    def many_tokens(load: int, groups: int) -> float:
        nonlocal calls
        calls += 1
        chosen = rng.permutation(experts)[: groups * top_k].reshape(groups, top_k)
        ids = torch.from_numpy(np.tile(chosen, (load, 1)))
        x = torch.from_numpy(rng.standard_normal((len(ids), shape.hidden), dtype=np.float32))
        weights = torch.full(ids.shape, 1 / top_k)
        return timed(partial(runs[calls % len(runs)], x, ids, weights))

    counts = [count for count in _COUNTS if count <= experts]
    groups = {load: max(1, min(experts // top_k, _MOST_TOKENS // load)) for load in LOADS[1:]}
    took_s: dict[int, float] = {}

    def turn() -> tuple[dict[int, list[float]], dict[int, float]]:
        short: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(_SHORT_CALLS):
            for count in counts:
                short[count].append(one_token(count))
        loads: dict[int, float] = {}
        last_s = 0.0
        for load, most in groups.items():
            if took_s.get(load, 2.5 * last_s) > budget.left_s():
                break
            last_s = took_s[load] = loads[load] = many_tokens(load, most)
        return short, loads

    turns: Turns[tuple[dict[int, list[float]], dict[int, float]]] = Turns(others or Others())
    while not turns or (budget.left_s() > 0 and turns.wanting(_TURNS)):
        turns.measure(turn)
    found = ExpertTimes(shape, disturbed=turns.disturbed())
    kept = turns.kept()
    fits = [_line({n: typical(samples) for n, samples in short.items()}) for short, _ in kept]
    found.start_s = [start_s for start_s, _ in fits]
    found.loads[1] = [each_s for _, each_s in fits]
    start_s = median(found.start_s)
    _, first = turns.first()
    for load, most in groups.items():
        samples = [loads[load] for _, loads in kept if load in loads]
        if not samples and load in first:  # no other turn had time for it
            samples = [first[load]]
        if samples:
            found.loads[load] = [max(0.0, s - start_s) / (most * top_k) for s in samples]
    return found


def _line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fit ``start + n * each`` to seconds by n, all of them as good in proportion."""
    if len(seconds) == 1:  # nothing tells the two apart
        ((count, value),) = seconds.items()
        return 0.0, value / count
    values = list(seconds.values())
    each_s, start_s = np.polyfit(list(seconds), values, 1, w=[1 / max(s, 1e-12) for s in values])
    if start_s < 0:
        return 0.0, fmean(s / count for count, s in seconds.items())
    return float(start_s), max(0.0, float(each_s))


def bare_layers(shape: Block, experts: int) -> list[U8]:
    """Experts of a shape without a model around them, in as many layers as memory is read from."""
    blocks = fill(shape, experts)
    return [blocks[at : at + experts] for at in range(0, len(blocks), experts)]


def layer_times(
    layers: Sequence[U8],
    shape: Block,
    top_k: int,
    budget: Budget,
    runs: Sequence[LayerExperts] | None = None,
) -> ExpertTimes:
    """Measure layers of experts in our kernels, and in torch's products where those are offered.

    ``runs`` computes them as their model does; unless given, the kernels alone do.
    """
    count = len(layers[0])
    bare = [BareLayer(layer, shape) for layer in layers]
    kernels: Sequence[Run] = runs or [partial(compute_on_cpu, layer=layer) for layer in bare]
    own_gating = runs is not None and runs[0].own_gating
    if own_gating:  # between projections, which neither kernels nor panels join then
        single: list[RunSingle] = [partial(_from_arrays, run) for run in kernels]
    else:
        out = np.zeros((1, shape.hidden), np.float32)
        single = [partial(run_experts, blocks=layer, shape=shape, out=out) for layer in layers]
    if own_gating or not offered(shape):
        return expert_times(kernels, shape, count, top_k, budget, single=single)
    times = expert_times(kernels, shape, count, top_k, budget.part(0.5), single=single)
    panels = [partial(compute_on_cpu, layer=replace(layer, panels_from=1)) for layer in bare]
    more = expert_times(panels, shape, count, top_k, budget, single=single)
    # A single token never takes them.
    times.panels = {load: samples for load, samples in more.loads.items() if load > 1}
    times.disturbed = max(times.disturbed, more.disturbed)
    return times


def _from_arrays(run: Run, x: F32, ids: NDArray[np.int64], weights: F32) -> object:
    return run(torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights))


def read_rates(threads: int, budget: Budget) -> list[float]:
    """Bytes a second that all threads together read from memory, in samples."""
    words = np.ones(_READ_BYTES // 8, np.uint64)
    turns: Turns[float] = Turns(Others())
    while len(turns) < 3 or (budget.left_s() > 0 and turns.wanting(_READS)):
        turns.measure(lambda: read_seconds(words, threads))
    return [words.nbytes / seconds for seconds in turns.kept()]


@dataclass(frozen=True)
class DiskTimes:
    """Rates of long reads, seconds of short ones, and whether memory may have answered."""

    bytes_per_s: list[float]
    latency_s: list[float]
    cached: bool


def disk_times(folder: Path, budget: Budget) -> DiskTimes:
    """Write a file, have the system forget it, and read it again.

    Raises
    ------
    UsageError
        When the file cannot be written.
    """
    path = folder / f"disk-{os.getpid()}.part"
    forget = getattr(os, "posix_fadvise", None)
    try:
        with path.open("xb+", buffering=0) as file:
            block = np.random.default_rng(0).bytes(_DISK_BLOCK)
            for _ in range(_DISK_BYTES // _DISK_BLOCK):
                file.write(block)
            os.fsync(file.fileno())

            def drop() -> None:
                if forget is not None:
                    forget(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

            def read_all() -> float:
                drop()
                file.seek(0)
                start_s = time.perf_counter()
                while file.read(_DISK_BLOCK):
                    pass
                return time.perf_counter() - start_s

            pages = np.random.default_rng(1).permutation(_DISK_BYTES // _DISK_PAGE)
            rates = [_DISK_BYTES / seconds for seconds in budget.repeat(read_all, 1, 2)]
            drop()
            latency = []
            if forget is not None:  # else the system would read ahead
                forget(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for page in pages[:64].tolist():
                start_s = time.perf_counter()
                file.seek(page * _DISK_PAGE)
                file.read(_DISK_PAGE)
                latency.append(time.perf_counter() - start_s)
    except OSError as error:
        raise UsageError(
            f"cannot measure the disk with {path}: {error.strerror or error}",
            hint="set HYBRID_CACHE to a folder with 256 MiB of room",
        ) from error
    finally:
        path.unlink(missing_ok=True)
    return DiskTimes(rates, latency, cached=forget is None)
