"""What this machine does in a second: reads, routed experts of any load, reads from the disk.

Every function returns samples in seconds or rates, and takes the clock's word for it; what they
mean to the planner is made of them in :mod:`hybrid.calibration.calibrate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from torch import Tensor

from cpu_experts.experts import ExpertShape
from hybrid.bench.kernels import fill, read_seconds
from hybrid.errors import UsageError
from hybrid.experts import compute_on_cpu
from hybrid.panels import least_load, offered
from hybrid.store import U8

Run = Callable[[Tensor, Tensor, Tensor], object]
"""Computes one layer's experts: hidden states ``[T, D]``, ids and routing weights ``[T, A]``."""

LOADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_MOST_TOKENS = 512
_TURNS = 7
_SHORT_CALLS = 8
"""Calls of a single token in each turn."""
_READ_BYTES = 1 << 30
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


class Others:
    """How much of the processors other programs use while this one measures."""

    def __init__(self) -> None:
        self._start = self._times()

    def share(self) -> float:
        """Part of all processors' time since construction that went to others, 0 to 1."""
        busy_s, own_s, all_s = (
            now - before for now, before in zip(self._times(), self._start, strict=True)
        )
        return min(1.0, max(0.0, (busy_s - own_s) / all_s)) if all_s > 0 else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        times, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        waiting = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # count as user
        total = sum(times) - guests
        return total - waiting, mine.user + mine.system, total


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
    """

    shape: ExpertShape
    start_s: list[float] = field(default_factory=list)
    loads: dict[int, list[float]] = field(default_factory=dict)
    panels: dict[int, list[float]] = field(default_factory=dict)

    def panels_from(self) -> int | None:
        """The load from which those are faster; None is never."""
        kernels, panels = (
            {load: float(median(samples)) for load, samples in found.items()}
            for found in (self.loads, self.panels)
        )
        return least_load(kernels, panels)


def expert_times(
    runs: Sequence[Run], shape: ExpertShape, experts: int, top_k: int, budget: Budget
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

    Notes
    -----
    A call of m experts takes ``start + m * each``: a call of a single token and one of as many
    experts as possible, each with one token, tell the two apart. The other loads follow from the
    start that is known then. Loads take turns, so that a moment's disturbance is one sample of
    many loads and not all of one's.
    """
    rng = np.random.default_rng(0)
    turn = 0

    def measure(load: int, most: int) -> float:
        nonlocal turn
        groups = max(1, min(experts // top_k, most))
        chosen = rng.permutation(experts)[: groups * top_k].reshape(groups, top_k)
        ids = torch.from_numpy(np.tile(chosen, (load, 1)))
        x = torch.from_numpy(rng.standard_normal((len(ids), shape.hidden), dtype=np.float32))
        weights = torch.full(ids.shape, 1 / top_k)
        turn += 1
        start_s = budget.now_s()
        runs[turn % len(runs)](x, ids, weights)
        return budget.now_s() - start_s

    many = max(1, min(experts // top_k, _MOST_TOKENS))
    kinds = [(1, 1)] * _SHORT_CALLS + [(1, many)] * 3
    kinds += [(load, max(1, min(many, _MOST_TOKENS // load))) for load in LOADS[1:]]
    turns: list[dict[tuple[int, int], list[float]]] = []
    took_s: dict[int, float] = {}
    last_s = 0.0
    while len(turns) < _TURNS and (not turns or budget.left_s() > 0):
        turns.append({})
        for load, groups in kinds:
            if load > 1 and took_s.get(load, 2.5 * last_s) > budget.left_s():
                break
            last_s = took_s[load] = measure(load, groups)
            turns[-1].setdefault((load, groups), []).append(last_s)
    found = ExpertTimes(shape)
    # The first turn allocates: it counts only for what no other turn had time for.
    later = [turn for turn in turns[1:] if turn] or turns

    def of(kind: tuple[int, int]) -> list[float]:
        return [s for turn in later for s in turn.get(kind, ())] or turns[0].get(kind, [])

    one, all_s = of((1, 1)), of((1, many))
    if many == 1:  # every call uses as many experts: nothing tells start and experts apart
        found.start_s, found.loads[1] = [0.0], [seconds / top_k for seconds in one]
    else:
        each_s = (median(all_s) - median(one)) / (many * top_k - top_k)
        found.start_s = [max(0.0, seconds - top_k * each_s) for seconds in one]
        start_s = median(found.start_s)
        found.loads[1] = [max(0.0, s - start_s) / (many * top_k) for s in all_s]
    start_s = median(found.start_s)
    for load, groups in kinds[_SHORT_CALLS + 3 :]:
        if samples := of((load, groups)):
            found.loads[load] = [max(0.0, s - start_s) / (groups * top_k) for s in samples]
    return found


def bare_layers(shape: ExpertShape, experts: int) -> list[U8]:
    """Experts of a shape without a model around them, in as many layers as memory is read from."""
    blocks = fill(shape, experts)
    return [blocks[at : at + experts] for at in range(0, len(blocks), experts)]


def layer_times(
    layers: Sequence[U8],
    shape: ExpertShape,
    top_k: int,
    budget: Budget,
    runs: Sequence[Run] | None = None,
) -> ExpertTimes:
    """Measure layers of experts in our kernels, and in torch's products where those are offered.

    ``runs`` computes them as their model does; unless given, the kernels alone do.
    """
    count = len(layers[0])
    computed = partial(compute_on_cpu, shape=shape)
    kernels = runs or [partial(computed, blocks=layer) for layer in layers]
    if not offered(shape):
        return expert_times(kernels, shape, count, top_k, budget)
    times = expert_times(kernels, shape, count, top_k, budget.part(0.5))
    panels = [partial(computed, blocks=layer, panels_from=1) for layer in layers]
    times.panels = expert_times(panels, shape, count, top_k, budget).loads
    return times


def read_rates(threads: int, budget: Budget) -> list[float]:
    """Bytes a second that all threads together read from memory, in samples."""
    words = np.ones(_READ_BYTES // 8, np.uint64)
    return [words.nbytes / s for s in budget.repeat(lambda: read_seconds(words, threads), 3, 8)]


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
