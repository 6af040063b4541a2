"""Run the experts of a call straight from packed slots: Triton where it can, else plain torch.

Both implementations widen the same quantized weights and sum in float32. The Triton kernels for
many tokens round widened weights and the intermediate activations to the activations' type, as
any half-precision matrix product does; those for a token or a few do not.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpu_experts import reference
from gpu_experts.device import Note
from gpu_experts.layout import GROUP, TILE, BlockLayout, pad
from gpu_experts.routing import TILE_ROWS, VECTOR_LOAD, Routing, sort_by_slot

Implementation = Literal["torch", "triton"]

#: Inputs whose order the matrix kernels permute together.
SPAN = 128
#: The most that intermediate results of one pass may take; longer calls are cut by tokens.
WORKSPACE_BYTES = 128 << 20


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def choose(layout: BlockLayout) -> tuple[Implementation, Note | None]:
    """What runs experts of this layout on a GPU, and what to say when it is the slow way."""
    if not layout.quantized:
        remedy = "convert the model to q4_0 or q8_0 for the device kernels"
        reason = f"the device kernels read q4_0 and q8_0, the experts are {layout.format}"
        return "torch", Note("experts on the GPU in plain torch", reason, remedy)
    if not has_triton():
        remedy = "install triton (on Windows triton-windows)"
        reason = "triton is not installed, every expert is widened for every use"
        return "torch", Note("experts on the GPU in plain torch", reason, remedy)
    return "triton", None


def probe(layout: BlockLayout, device: torch.device) -> Note | None:
    """Run each kind of Triton kernel once, so that they are compiled before they are needed.

    Returns
    -------
    None, or what to say when they cannot be compiled or started here: Triton needs a C compiler
    and a GPU that it knows.
    """
    slots = torch.zeros(1, layout.stride, dtype=torch.uint8, device=device)
    try:
        for tokens in (1, VECTOR_LOAD + 1, *TILE_ROWS):
            x = torch.zeros(tokens, layout.hidden, dtype=torch.bfloat16, device=device)
            routing = sort_by_slot(
                np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
            )
            out = torch.zeros(x.shape, device=device)
            table = torch.from_numpy(routing.table).to(device)
            run(x, routing, table, slots, layout, out, "triton")
            out.cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]
        reason = f"triton cannot run here: {said[0]}"
        remedy = "install a C compiler, and a triton that fits torch and the GPU"
        return Note("experts on the GPU in plain torch", reason, remedy)
    return None


def workspace_bytes(layout: BlockLayout, tokens: int, choices: int) -> int:
    """Most device memory that :func:`run` takes beside its arguments for such a call."""
    each = _pair_bytes(layout, torch.float32)
    pairs = min(tokens * choices, max(choices, WORKSPACE_BYTES // each))
    return pairs * each + 4 * tokens * pad(layout.hidden, SPAN)


def _pair_bytes(layout: BlockLayout, dtype: torch.dtype) -> int:
    return pad(layout.padded_intermediate, SPAN) * dtype.itemsize + 4 * layout.hidden


def tokens_a_pass(layout: BlockLayout, choices: int) -> int:
    """Tokens of a call that run together, so that a pass keeps to :data:`WORKSPACE_BYTES`."""
    each = _pair_bytes(layout, torch.float32) * max(1, choices)
    return max(1, WORKSPACE_BYTES // each)


def run(
    x: Tensor,
    routing: Routing,
    table: Tensor,
    slots: Tensor,
    layout: BlockLayout,
    out: Tensor,
    implementation: Implementation,
) -> None:
    """Add the weighted outputs of the routed slots to ``out``; enqueues and does not wait.

    Parameters
    ----------
    x
        ``[T, D]`` contiguous float16, bfloat16 or float32.
    routing, table
        What goes where, and ``routing.table`` on ``x``'s device.
    slots
        ``[slots, stride]`` uint8 contiguous, every routed one filled.
    out
        ``[T, D]`` float32 contiguous, added to.

    Notes
    -----
    A result does not depend on what else runs, nor on the order of the slots.
    """
    if routing.pairs == 0:
        return
    if implementation == "torch":
        reference.run(x, routing, table, slots, layout, out)
    elif routing.largest_load <= VECTOR_LOAD:
        _run_vector(x, routing, table, slots, layout, out)
    else:
        _run_matrix(x, routing, table, slots, layout, out)


def _views(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slots as words, as float16 and as float32."""
    flat = slots.view(-1)
    return flat.view(torch.int32), flat.view(torch.float16), flat.view(torch.float32)


def _up_constants(layout: BlockLayout) -> dict[str, Any]:
    return {
        "Q4": layout.format == "q4_0",
        "GATED": layout.gated,
        "BIAS": layout.bias,
        "CLAMPED": math.isfinite(layout.limit),
        "ACTIVATION": layout.activation,
    }


def _arithmetic(layout: BlockLayout) -> tuple[float, float, float]:
    limit = layout.limit if math.isfinite(layout.limit) else 0.0
    return float(layout.alpha), float(limit), float(layout.up_offset)


def _run_vector(
    x: Tensor, routing: Routing, table: Tensor, slots: Tensor, layout: BlockLayout, out: Tensor
) -> None:
    from gpu_experts import triton_kernels as kernels

    fp, strips = layout.padded_intermediate, pad(layout.hidden, TILE) // TILE
    h = torch.empty(routing.pairs, fp, dtype=torch.float32, device=x.device)
    views, slot_of, token_of = _views(slots), routing.slot_of(table), routing.token_of(table)
    common = {"GROUPS": 8, "num_warps": 4}
    kernels.up_vector[(routing.pairs, fp // TILE)](
        x,
        *views,
        routing.user_of(table),
        slot_of,
        token_of,
        h,
        layout.hidden,
        pad(layout.hidden, GROUP) // GROUP,
        fp // TILE,
        layout.stride // 16,
        layout.bias_offset // 16,
        *_arithmetic(layout),
        **_up_constants(layout),
        STRIPS=1,
        **common,
    )
    kernels.down_vector[(routing.users, strips)](
        h,
        *views,
        slot_of,
        routing.weight_of(table),
        routing.by_user(table),
        token_of,
        routing.begin_of(table),
        out,
        fp,
        layout.hidden,
        fp // GROUP,
        strips,
        layout.stride // 16,
        layout.down_offset // 16,
        (layout.bias_offset + 4 * layout.up_rows) // 16,
        Q4=layout.format == "q4_0",
        BIAS=layout.bias,
        STRIPS=1,
        **common,
    )


def permute_inputs(x: Tensor, fmt: str) -> Tensor:
    """Rows of ``x`` ``[T, D]`` in the matrix kernels' order, zero-padded to whole spans.

    Input ``4 j + b`` (q8_0) or ``16 i + 4 j + b`` (q4_0) of a group goes where the words'
    bytes and nibbles of one bit position lie together, for four groups at a time.
    """
    tokens, cols = x.shape
    spans = pad(cols, SPAN) // SPAN
    padded = x if cols == spans * SPAN else torch.nn.functional.pad(x, (0, spans * SPAN - cols))
    if fmt == "q4_0":  # [span, group, half, chunk, byte] -> [span, half, byte, group, chunk]
        split = padded.reshape(tokens, spans, 4, 2, 4, 4).permute(0, 1, 3, 5, 2, 4)
    else:  # [span, group, chunk, byte] -> [span, byte, group, chunk]
        split = padded.reshape(tokens, spans, 4, 8, 4).permute(0, 1, 4, 2, 3)
    return split.reshape(tokens, spans * SPAN)


def _run_matrix(
    x: Tensor, routing: Routing, table: Tensor, slots: Tensor, layout: BlockLayout, out: Tensor
) -> None:
    from gpu_experts import triton_kernels as kernels

    fp, strips = layout.padded_intermediate, pad(layout.hidden, TILE) // TILE
    token_of = routing.token_of(table)
    inputs = permute_inputs(x if routing.users == len(x) else x[token_of], layout.format)
    h = torch.empty(routing.pairs, pad(fp, SPAN), dtype=x.dtype, device=x.device)
    y = torch.empty(routing.pairs, layout.hidden, dtype=torch.float32, device=x.device)
    views, tiles = _views(slots), routing.tile_table(table)
    # Gate and up are two accumulators: half as many rows of each as of down.
    across = 2
    common = {"ROWS": routing.tile_rows, "num_warps": 4, "num_stages": 2}
    kernels.up_matrix[(routing.tiles, -(-fp // (TILE * across)))](
        inputs,
        *views,
        routing.user_of(table),
        tiles,
        h,
        inputs.shape[1],
        h.shape[1],
        pad(layout.hidden, GROUP) // GROUP,
        fp // TILE,
        layout.stride // 16,
        layout.bias_offset // 16,
        *_arithmetic(layout),
        **_up_constants(layout),
        STRIPS=across,
        **common,
    )
    kernels.down_matrix[(routing.tiles, -(-strips // (2 * across)))](
        h,
        *views,
        tiles,
        y,
        h.shape[1],
        layout.hidden,
        fp // GROUP,
        strips,
        layout.stride // 16,
        layout.down_offset // 16,
        (layout.bias_offset + 4 * layout.up_rows) // 16,
        Q4=layout.format == "q4_0",
        BIAS=layout.bias,
        STRIPS=2 * across,
        **common,
    )
    block = 256
    kernels.add_pairs[(routing.users, -(-layout.hidden // block))](
        y,
        routing.weight_of(table),
        routing.by_user(table),
        token_of,
        routing.begin_of(table),
        out,
        layout.hidden,
        BLOCK=block,
    )
