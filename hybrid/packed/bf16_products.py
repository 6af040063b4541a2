"""Products of many tokens in bfloat16, where those are the faster ones.

Our int8 kernels multiply a token with packed weights as they are. Where the processor has units
for bfloat16, it pays from some number of tokens on to widen a matrix first: into tiles of AMX
(:mod:`cpu_experts.tiles`), or else as torch takes them, which then multiplies (oneDNN). From how
many on is measured: roughly when a model is first loaded (``first_measure.py``), and for experts
of a certain shape, beside the kernels and with the same tokens, by a calibration. On processors
without such units it is never. What is widened at a time is bounded, whatever a model's matrices
and prompts are: no budget has to know of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cpu_experts import tiles
from cpu_experts.jit.turns import Turn
from cpu_experts.kernels.widen import WIDENED, widen
from cpu_experts.workspace import Ids
from gpu_experts.reference import gated
from hybrid.formats.block import Block
from hybrid.formats.registry import format_of, is_quantized
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
    return has_native_bf16() and all(is_quantized(fmt) and widens(fmt) for fmt in shape.formats)


def widens(fmt: str) -> bool:
    """Whether matrices of a format are widened here, by whatever multiplies them."""
    return fmt in (*WIDENED, "bf16") or tiles.takes(fmt, GROUP)


def multiplier() -> str:
    """What multiplies, in the words of reports."""
    return "matrix units (AMX) in bfloat16" if tiles.available() else "torch's bfloat16"


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
    return least_load(_seconds(spec, shape, "cpu"), _seconds(spec, shape, PANELS))


def measured(spec: HardwareSpec, shape: Block) -> bool:
    """Whether a calibration measured experts of this shape both ways."""
    return bool(_seconds(spec, shape, "cpu") and _seconds(spec, shape, PANELS))


def _seconds(spec: HardwareSpec, shape: Block, lane: str) -> dict[int, float]:
    wanted = (shape.hidden, shape.intermediate, shape.format_name, lane)
    points = [p for p in spec.points if (p.hidden, p.intermediate, p.format, p.lane) == wanted]
    return {point.load: point.seconds for point in points}


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
        self.lock = Turn()

    def panel(self, packed: U8, rows: int, cols: int, fmt: str) -> Tensor:
        """Return ``[rows, cols]``, valid until the next call."""
        if fmt == "bf16":
            strips = torch.from_numpy(packed).view(torch.bfloat16).view(-1, cols, TILE)
            return strips.transpose(1, 2).reshape(-1, cols)[:rows]
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
    if tiles.takes_experts(shape):
        return _in_tiles(x, expert_ids, routing_weights, blocks, shape, least_load, out)
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


def _in_tiles(
    x: F32,
    expert_ids: Ids,
    routing_weights: F32,
    blocks: U8,
    shape: Block,
    least_load: int,
    out: F32,
) -> Ids:
    """Do what :func:`run_panels` does, in tiles."""
    count = len(blocks)
    inside = (expert_ids >= 0) & (expert_ids < count)
    loads = np.bincount(expert_ids[inside], minlength=count)
    many = inside & (loads >= max(1, least_load))[np.where(inside, expert_ids, 0)]
    if many.any():
        chosen = np.where(many, expert_ids, -1)
        tiles.run_experts(x, chosen, routing_weights, blocks, shape, out)
    left = expert_ids.copy()
    left[many] = -1
    return left


def multiply(x: Tensor, packed: U8, rows: int, fmt: str) -> Tensor:
    """Return the products ``[T, rows]`` float32 of ``x`` ``[T, cols]`` with a packed matrix."""
    cols = x.shape[1]
    if not tiles.takes(fmt, cols):
        with _MEMORY.lock:
            return _multiply(x, packed, rows, cols, fmt)
    out = torch.empty(len(x), rows)
    tiles.linear(x.float().contiguous().numpy(), packed, fmt, None, out.numpy())
    return out


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
