"""Packed experts in plain torch, on any device: the twin of the Triton kernels, and their stand-in.

Weights are widened to float32 and so is ``x``: what differs from the CPU kernels is only that
activations are not rounded to int8 and that sums run in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from gpu_experts.routing import Routing
from hybrid.formats.block import Block
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of
from hybrid.formats.strips import TILE, Format, pad

#: Weights that are widened at a time: what that takes beside them is about twice as much again.
_SLICE_BYTES = 16 << 20


def dequantize(
    packed: Tensor, rows: int, cols: int, fmt: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Widen a packed matrix where it lies.

    Parameters
    ----------
    packed
        uint8 ``[bytes]`` on any device, strips of 16 rows as :mod:`hybrid.formats.strips` says.
    fmt
        Any format; those that are not quantized are laid out again.

    Returns
    -------
    ``[rows, cols]`` in ``dtype`` on the same device, each number rounded once from float32.

    Raises
    ------
    FormatError
        On an unknown format.
    ShapeError
        When ``packed`` is not what ``rows``, ``cols`` and ``fmt`` take.
    """
    packing, size = format_of(fmt), packed_bytes(rows, cols, fmt)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ShapeError(
            f"packed {fmt} [{rows}, {cols}] takes uint8 [{size}],"
            f" got {packed.dtype} {list(packed.shape)}"
        )
    out = torch.empty(pad(rows, TILE), cols, dtype=dtype, device=packed.device)
    for rows_here, values in _slices(packed, cols, packing):
        out[rows_here] = values
    return out[:rows]


def _slices(packed: Tensor, cols: int, packing: Format) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a packed matrix after the other, as float32 ``[n, cols]``."""
    strips = packed.view(-1, packing.strip_bytes(cols))
    step = max(1, _SLICE_BYTES // max(1, 4 * TILE * cols))
    for first in range(0, len(strips), step):
        values = _widen(strips[first : first + step], packing)
        yield slice(first * TILE, first * TILE + len(values)), values[:, :cols]


def _multiply(x: Tensor, packed: Tensor, cols: int, packing: Format) -> Tensor:
    """Products of ``x`` ``[n, cols]`` with a packed matrix, rows of whole strips included."""
    rows = len(packed) // packing.strip_bytes(cols) * TILE
    y = torch.empty(len(x), rows, device=x.device)
    for rows_here, values in _slices(packed, cols, packing):
        y[:, rows_here] = functional.linear(x, values)
    return y


def _widen(strips: Tensor, packing: Format) -> Tensor:
    """Strips ``[n, bytes]`` as float32 ``[16 n, inputs]``, padding included."""
    units = strips.view(strips.shape[0], -1, packing.unit_bytes)
    if packing.name in _CODES:
        values = _grouped(units, _CODES[packing.name])
    elif packing.tensor:
        kind = getattr(torch, packing.tensor)
        values = units.contiguous().view(kind).transpose(1, 2).float()
    else:  # on the host, by the format's own rules
        values = torch.from_numpy(packing.unpack(units.cpu().numpy())).to(strips.device)
    return values.reshape(strips.shape[0] * TILE, units.shape[1] * packing.unit_inputs)


def _grouped(units: Tensor, codes_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Units ``[n, groups, bytes]`` of a quantized format as float32 ``[n, 16, groups, 8, 4]``."""
    split = units.shape[2] - 2 * TILE
    codes = codes_of(units[:, :, :split].reshape(*units.shape[:2], -1, TILE, 4))
    scales = units[:, :, split:].contiguous().view(torch.float16).float()
    return codes.permute(0, 3, 1, 2, 4) * scales.transpose(1, 2)[..., None, None]


def _codes_q4_0(chunks: Tensor) -> Tensor:
    return torch.cat((chunks & 15, chunks >> 4), dim=2).float() - 8


def _codes_q8_0(chunks: Tensor) -> Tensor:
    return chunks.view(torch.int8).float()


#: From chunks ``[n, groups, chunks, 16, 4]`` to codes ``[n, groups, 8, 16, 4]``, without scales.
_CODES: dict[str, Callable[[Tensor], Tensor]] = {"q4_0": _codes_q4_0, "q8_0": _codes_q8_0}


def activate(layout: Block, v: Tensor) -> Tensor:
    """The layout's activation, element by element."""
    match layout.activation:
        case "silu":
            return v * torch.sigmoid(layout.alpha * v)
        case "gelu":
            return functional.gelu(v)
        case "gelu_tanh":
            return functional.gelu(v, approximate="tanh")
        case "relu":
            return torch.relu(v)
        case "relu2":
            return torch.relu(v).square()
        case "sigmoid":
            return torch.sigmoid(v)
    return v


def sides_of(layout: Block, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, ``[n, F]`` each, of the packed up side's product; up twice without a gate."""
    # Strips of gate and up alternate: [n, strip, side, row] -> side, [n, F]
    sides = y.view(
        len(y), layout.padded_intermediate // TILE, 2 if layout.gated else 1, TILE
    ).movedim(2, 0)
    gate, up = (
        side.reshape(len(y), layout.padded_intermediate)[:, : layout.intermediate]
        for side in (sides[0], sides[-1])
    )
    return gate, up


def gated(layout: Block, y: Tensor) -> Tensor:
    """What down multiplies, ``[n, F]``, of the packed up side's product ``[n, up_rows]``."""
    gate, up = sides_of(layout, y)
    if math.isfinite(layout.limit):
        gate = gate.clamp(max=layout.limit)
        up = up.clamp(-layout.limit, layout.limit)
    return (
        activate(layout, gate) * (up + layout.up_offset) if layout.gated else activate(layout, up)
    )


def expert(layout: Block, block: Tensor, x: Tensor) -> Tensor:
    """One expert's output ``[n, D]`` float32 on tokens ``[n, D]`` float32, not weighted."""
    d = layout.hidden
    y = _multiply(x, block[: layout.up_bytes], d, layout.packing)
    floats = block[layout.bias_offset :].view(torch.float32) if layout.bias else None
    if floats is not None:
        y = y + floats[: layout.up_rows]
    h = gated(layout, y)
    packed = block[layout.down_offset : layout.down_offset + layout.down_bytes]
    y = _multiply(h, packed, layout.intermediate, layout.down_packing)[:, :d]
    return y if floats is None else y + floats[layout.up_rows : layout.up_rows + d]


def run(
    x: Tensor, routing: Routing, table: Tensor, slots: Tensor, layout: Block, out: Tensor
) -> None:
    """Add the weighted outputs of the routed slots to ``out``, slot by slot.

    Parameters
    ----------
    x
        ``[T, D]``, any floating dtype.
    routing, table
        What goes where, and its table on ``x``'s device.
    slots
        ``[slots, stride]`` uint8.
    out
        ``[T, D]`` float32, added to.
    """
    tokens = routing.token_of(table)[routing.user_of(table)]
    weights = routing.weight_of(table)
    for slot, first, count in routing.runs:
        mine = tokens[first : first + count]
        y = expert(layout, slots[slot], x[mine].float())
        out.index_add_(0, mine, y * weights[first : first + count, None])
