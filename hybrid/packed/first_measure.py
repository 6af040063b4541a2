"""From how many tokens on products in bfloat16 are faster: measured once a machine, in a second.

What is found is kept beside the calibrations, keyed by the processor, the code and the libraries
as they are. It is of one matrix for every format; a calibration knows a model's own experts
better.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from cpu_experts.ffn import linear
from hybrid.errors import UsageError
from hybrid.formats.block import Block
from hybrid.formats.matrix import pack
from hybrid.formats.strips import TILE, U8
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.machine.host import has_native_bf16
from hybrid.packed.bf16_products import (
    least_load,
    measured,
    multiplier,
    multiply,
    offered,
    panels_from,
    widens,
)
from hybrid.paths import make_cache_folder, write_whole

_log = logging.getLogger("hybrid")
#: The matrix, and the tokens that are multiplied with it.
_ROWS, _COLS = 1536, 2048
_TOKENS = (8, 16, 32, 64, 128, 256)
_TURNS = 5


def least_tokens(*formats: str) -> int | None:
    """The tokens from which matrices of all formats are faster in bfloat16; None is never.

    Measures when nothing is known, and says so once.
    """
    if not has_native_bf16() or not all(map(widens, formats)):
        return None
    found = [_kept(fmt, torch.get_num_threads()) for fmt in dict.fromkeys(formats)]
    known = [least for least in found if least is not None]
    return max(known) if len(known) == len(found) else None


def panels_of(shape: Block, dtype: torch.dtype) -> int | None:
    """The load from which experts of a model that computes in ``dtype`` are faster so.

    As a calibration says, where there is one; else, in bfloat16, as a matrix of their format.
    """
    hardware = calibrations.alone(torch.get_num_threads())
    if dtype != torch.bfloat16 or (hardware is not None and measured(hardware, shape)):
        return panels_from(shape, hardware)
    return least_tokens(*shape.formats) if offered(shape) else None


@cache
def _kept(fmt: str, threads: int) -> int | None:
    path = Identity.of_this_machine(threads).path.with_suffix(".products.json")
    known = _read(path)
    if fmt not in known:
        known[fmt] = _measure(fmt)
        with suppress(UsageError):  # a machine that keeps nothing measures at every start
            make_cache_folder("hardware")
            write_whole(path, json.dumps(known))
    return known[fmt]


def _read(path: Path) -> dict[str, int | None]:
    """What is kept there; nothing where it is not what was written."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(
            value is None or type(value) is int for value in found.values()
        ):
            return found
    return {}


def _measure(fmt: str) -> int | None:
    start_s = time.perf_counter()
    packed, out = _matrix(fmt), np.zeros((_TOKENS[-1], _ROWS), np.float32)
    kernels: dict[int, list[float]] = {count: [] for count in _TOKENS}
    products: dict[int, list[float]] = {count: [] for count in _TOKENS}
    x = torch.randn(_TOKENS[-1], _COLS, generator=torch.Generator().manual_seed(0))
    for turn in range(_TURNS + 1):
        for count in _TOKENS:
            some = x[:count]
            began_s = time.perf_counter()
            linear(some.numpy(), packed, fmt, None, out[:count])
            between_s = time.perf_counter()
            multiply(some, packed, _ROWS, fmt)
            if turn:  # the first one compiles
                kernels[count].append(between_s - began_s)
                products[count].append(time.perf_counter() - between_s)
    # The fastest of each: whatever else the machine does meanwhile only makes them slower.
    found = least_load(*({n: min(s) for n, s in side.items()} for side in (kernels, products)))
    told = "never" if found is None else f"from {found} tokens on"
    _log.info(
        "measured once: %s multiply %s faster than the kernels %s (%.1f s)",
        multiplier(),
        fmt,
        told,
        time.perf_counter() - start_s,
    )
    return found


def _matrix(fmt: str) -> U8:
    """Any matrix: a strip, as often as it takes."""
    strip = np.random.default_rng(0).standard_normal((TILE, _COLS), dtype=np.float32)
    return np.tile(pack(strip, fmt), _ROWS // TILE)
