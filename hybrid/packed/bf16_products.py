"""Experts of many tokens through torch's bfloat16 products, where those are the faster ones.

Our int8 kernels multiply a token with packed weights as they are. Where the processor has matrix
units for bfloat16, it pays from some load on to lay an expert's matrices out as torch takes them
and to let it multiply (oneDNN): which load that is a calibration measures, beside the kernels and
with the same tokens. Without a calibration, and on processors without such units, it is never.
What is laid out at a time is bounded, whatever a model's experts and prompts are: no budget has to
know of it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cpu_experts.ffn import Ids
from cpu_experts.kernels.widen import WIDENED, widen
from gpu_experts.reference import gated
from hybrid.formats.block import Block
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, GROUP, TILE, U8, pad
from hybrid.machine import calibrations
from hybrid.machine.host import has_native_bf16
from planner.describe.hardware import PANELS, HardwareSpec

_WEIGHTS = 1 << 24
"""The most weights that are laid out at a time, 6 bytes each."""
_TOKENS = 512
"""The most tokens that are multiplied with them at a time: as many as calibrations try."""


def offered(shape: Block) -> bool:
    """Whether it is worth measuring for experts of this shape."""
    return has_native_bf16() and all(fmt in WIDENED for fmt in shape.formats)


def panels_from(shape: Block, hardware: HardwareSpec | None = None) -> int | None:
    """The load from which a calibration found panels faster; None is never.

    Parameters
    ----------
    shape
        Of the experts.
    hardware
        What was measured; this machine's calibration unless given. Where a planner decides, what
        it decides by: so it reckons with what the CPU does.
    """
    if not offered(shape):
        return None
    if hardware is None:
        hardware = calibrations.alone(torch.get_num_threads())
    return None if hardware is None else faster_from(hardware, shape)


def faster_from(spec: HardwareSpec, shape: Block) -> int | None:
    """Return :func:`least_load` of what a calibration measured."""
    wanted = (shape.hidden, shape.intermediate, shape.format_name)
    points = [p for p in spec.points if (p.hidden, p.intermediate, p.format) == wanted]
    kernels, panels = (
        {p.load: p.seconds for p in points if p.lane == lane} for lane in ("cpu", PANELS)
    )
    return least_load(kernels, panels)


def least_load(kernels_s: Mapping[int, float], panels_s: Mapping[int, float]) -> int | None:
    """The least load from which panels take no longer at any load that was measured.

    Parameters
    ----------
    kernels_s, panels_s
        Load to what an expert takes.
    """
    least = None
    for load in sorted(panels_s.keys() & kernels_s.keys(), reverse=True):
        if panels_s[load] > kernels_s[load]:
            break
        least = load
    return least


class _Memory:
    """Some rows of a matrix at a time, widened and in bfloat16, in memory that is used again."""

    def __init__(self) -> None:
        self._floats = np.empty(0, np.float32)
        # As integers: what torch allocates in inference mode cannot be written outside of it.
        self._halves = np.empty(0, np.int16)
        self.lock = threading.Lock()

    def panel(self, packed: U8, rows: int, cols: int, fmt: str) -> Tensor:
        """Return ``[rows, cols]``, valid until the next call."""
        shape = (pad(rows, TILE), pad(cols, GROUP))
        size = shape[0] * shape[1]
        if self._floats.size < size:
            self._floats, self._halves = np.empty(size, np.float32), np.empty(size, np.int16)
        floats = self._floats[:size].reshape(shape)
        widen(packed, rows, cols, fmt, floats)
        halves = torch.from_numpy(self._halves[:size]).view(torch.bfloat16).view(shape)
        halves.copy_(torch.from_numpy(floats))
        return halves[:rows, :cols]


_MEMORY = _Memory()


def run_panels(
    x: F32,
    expert_ids: Ids,
    routing_weights: F32,
    blocks: U8,
    shape: Block,
    least_load: int,
    out: F32,
) -> Ids:
    """Add the output of the experts that have at least ``least_load`` tokens to ``out``.

    Parameters
    ----------
    x, expert_ids, routing_weights, blocks, shape, out
        As for :func:`cpu_experts.ffn.run_experts`.

    Returns
    -------
    The ids of all others, -1 in the place of those that are done.

    Notes
    -----
    Weights, ``x`` and the intermediate activations are rounded to bfloat16, to 8 bits of mantissa;
    sums are float32. Memory is 96 MiB at most, besides the activations of 512 tokens of an expert.
    """
    if len(x) < least_load:
        return expert_ids
    ids, count, choices = torch.from_numpy(expert_ids), len(blocks), expert_ids.shape[1]
    hidden, total = torch.from_numpy(x), torch.from_numpy(out)
    weights, flat = torch.from_numpy(routing_weights).reshape(-1), ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    loads = torch.bincount(flat[(flat >= 0) & (flat < count)], minlength=count)
    ends = int((flat < 0).sum()) + loads.cumsum(0)
    left = flat.clone()
    with _MEMORY.lock:
        for expert in torch.nonzero(loads >= max(1, least_load)).flatten().tolist():
            pairs = order[ends[expert] - loads[expert] : ends[expert]]
            for some in pairs.chunk(-(-len(pairs) // _TOKENS)):
                tokens = some // choices
                y = _expert(shape, blocks[expert], hidden[tokens])
                total.index_add_(0, tokens, y * weights[some, None])
            left[pairs] = -1
    remaining: Ids = left.view(ids.shape).numpy()
    return remaining


def _expert(shape: Block, block: U8, x: Tensor) -> Tensor:
    """One expert's output ``[n, D]`` float32 on tokens ``[n, D]`` float32, not weighted."""
    d, f = shape.hidden, shape.intermediate
    y = _multiply(x, block, shape.up_rows, d, shape.format)
    floats = None
    if shape.bias:
        floats = torch.from_numpy(block[shape.bias_offset :].view(np.float32).copy())
        y += floats[: shape.up_rows]
    h = gated(shape, y)
    y = _multiply(h, block[shape.down_offset :], d, f, shape.formats[1])
    return y if floats is None else y + floats[shape.up_rows : shape.up_rows + d]


def _multiply(x: Tensor, block: U8, rows: int, cols: int, fmt: str) -> Tensor:
    """Products ``[n, rows]`` float32 of ``x`` with the matrix that ``block`` begins with."""
    halves, strip = x.bfloat16(), format_of(fmt).strip_bytes(cols)
    at_once = TILE * max(1, _WEIGHTS // (TILE * pad(cols, GROUP)))
    found = []
    for first in range(0, rows, at_once):
        here = min(at_once, rows - first)
        packed = block[first // TILE * strip :][: pad(here, TILE) // TILE * strip]
        found.append(functional.linear(halves, _MEMORY.panel(packed, here, cols, fmt)).float())
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
