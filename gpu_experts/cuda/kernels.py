"""Run the experts of a call straight from packed slots: Triton where it can, else plain torch.

Both implementations widen the same quantized weights and sum in float32. The Triton kernels for
many tokens round widened weights and the intermediate activations to the activations' type, as
any half-precision matrix product does; those for a token or a few do not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_experts import reference
from gpu_experts.cuda.runtime import ran_out_of_memory
from gpu_experts.routing import TILE_ROWS, VECTOR_LOAD, Routing, sort_by_slot
from hybrid.formats.block import Block
from hybrid.formats.errors import FormatError
from hybrid.formats.matrix import pack
from hybrid.formats.notes import Note
from hybrid.formats.strips import GROUP, TILE, pad

Implementation = Literal["torch", "triton"]
#: Brings an array to where kernels can read it: to the device, or to pinned memory.
Send = Callable[[NDArray[Any]], Tensor]

#: The weight formats that the Triton kernels read.
FORMATS = ("q4_0", "q8_0")
#: Inputs whose order the matrix kernels permute together.
SPAN = 128
#: The most that intermediate results of one pass may take; longer calls are cut by tokens.
WORKSPACE_BYTES = 128 << 20
#: How far the Triton kernels may be off plain torch, in the largest output: several times what
#: rounding to half precision does, and far less than any mistake.
AGREES = 0.05
#: Strips of a matrix that a sample expert has of its own; the others repeat them.
_SAMPLED_STRIPS = 32
#: What Triton needs of the system before it can start a kernel.
COMPILER = "a C compiler and Python's headers (on Debian gcc and python3-dev)"

NO_TENSOR_CORES = Note(
    "prompts' experts on the GPU without tensor cores",
    "triton uses them from compute capability 8.0 (Ampere) on, this GPU is older",
    "none yet: single tokens do not need them",
)

_log = logging.getLogger("gpu_experts")


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def choose(layout: Block) -> tuple[Implementation, Note | None]:
    """What runs experts of this layout on a GPU, and what to say when it is the slow way."""
    if layout.format not in FORMATS or layout.down_format:
        remedy = f"convert the model to {' or '.join(FORMATS)} for the device kernels"
        found = f"the experts are {layout.format_name}"
        reason = f"the device kernels read {' and '.join(FORMATS)}, {found}"
        return "torch", Note("experts on the GPU in plain torch", reason, remedy)
    if not has_triton():
        remedy = "install triton (on Windows triton-windows)"
        reason = "triton is not installed, every expert is widened for every use"
        return "torch", Note("experts on the GPU in plain torch", reason, remedy)
    return "triton", None


def probe(layout: Block, dtype: torch.dtype, device: torch.device, send: Send) -> Note | None:
    """Run each kind of Triton kernel once, so that they are compiled before they are needed.

    What they compute must be what plain torch computes: on a GPU of another kind than those where
    they were tried, nobody else would notice.

    Parameters
    ----------
    dtype
        Of the activations; every type has kernels of its own.
    device
        Where the slots are.
    send
        Brings a call's table, or the CPU's share, to where kernels can read it.

    Returns
    -------
    None, or what to say when they cannot be compiled or started here, or compute something else:
    Triton needs a C compiler and a GPU that it knows.
    """
    remedy = f"install {COMPILER}, and a triton that fits torch and the GPU"
    try:
        wrong = _differing(layout, dtype, device, send)
    except CalledProcessError as error:  # its message is a compiler's command line
        reason = f"triton cannot run here: {error.cmd[0]} failed to compile what starts kernels"
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        reason = f"triton cannot run here: {said}"
    else:
        if wrong is None:
            return None
        reason = f"triton's kernels are wrong here: {wrong}"
        remedy = "use another version of triton, and please report it"
    return Note("experts on the GPU in plain torch", reason, remedy)


def _differing(layout: Block, dtype: torch.dtype, device: torch.device, send: Send) -> str | None:
    """Compare the Triton kernels with plain torch at every kind of load; None when they agree."""
    _log.info("compiling GPU kernels for this model: seconds now, kept for the next time")
    slots = torch.from_numpy(_sample_block(layout)[None]).to(device)
    for tokens in (1, VECTOR_LOAD + 1, *TILE_ROWS):
        x = np.random.default_rng(tokens).standard_normal((tokens, layout.hidden), np.float32)
        hidden, share = torch.from_numpy(x).to(device, dtype), (0.01 * x).astype(np.float32)
        ids, ones = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
        routing = sort_by_slot(ids, ones)
        want, got = torch.zeros(2, *x.shape, device=device)
        table, total = torch.from_numpy(routing.table).to(device), torch.empty_like(hidden)
        run(hidden, routing, table, slots, layout, want, "torch")
        run(hidden, routing, send(routing.table), slots, layout, got, "triton")
        add_host(got, send(share), total)
        wrong = total.float().cpu() - torch.from_numpy(share) - want.cpu()
        off = float(wrong.abs().max() / want.abs().max())
        if not off <= AGREES:
            return f"{off:.2g} of the largest output off at {tokens} tokens"
    return None


def _sample_block(layout: Block) -> NDArray[np.uint8]:
    """An expert of random weights, of a size that keeps outputs near one."""
    draw = np.random.default_rng(0)
    block = np.zeros(layout.stride, np.uint8)
    sides = (
        (0, layout.up_rows, layout.hidden, layout.format),
        (layout.down_offset, layout.hidden, layout.intermediate, layout.formats[1]),
    )
    for start, rows, cols, fmt in sides:
        strips = pad(rows, TILE) // TILE
        few = min(strips, _SAMPLED_STRIPS)
        w = draw.standard_normal((few * TILE, cols), np.float32) / np.float32(cols**0.5)
        packed = pack(w, fmt).reshape(few, -1)
        place = block[start : start + strips * packed.shape[1]].reshape(strips, -1)
        place[:] = packed[np.concatenate((np.arange(few), draw.integers(0, few, strips - few)))]
    if layout.bias:
        biases = block[layout.bias_offset : layout.block_bytes].view(np.float32)
        biases[:] = draw.standard_normal(biases.size)
    return block


def workspace_bytes(layout: Block, tokens: int, choices: int) -> int:
    """Most device memory that :func:`run` takes beside its arguments for such a call."""
    each = _pair_bytes(layout, torch.float32)
    pairs = min(tokens * choices, max(choices, WORKSPACE_BYTES // each))
    return pairs * each + 4 * tokens * pad(layout.hidden, SPAN)


def _pair_bytes(layout: Block, dtype: torch.dtype) -> int:
    return pad(layout.padded_intermediate, SPAN) * dtype.itemsize + 4 * layout.hidden


def tokens_a_pass(layout: Block, choices: int) -> int:
    """Tokens of a call that run together, so that a pass keeps to :data:`WORKSPACE_BYTES`."""
    each = _pair_bytes(layout, torch.float32) * max(1, choices)
    return max(1, WORKSPACE_BYTES // each)


def run(
    x: Tensor,
    routing: Routing,
    table: Tensor,
    slots: Tensor,
    layout: Block,
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


def _up_constants(layout: Block) -> dict[str, Any]:
    return {
        "FMT": layout.format,
        "GATED": layout.gated,
        "BIAS": layout.bias,
        "CLAMPED": math.isfinite(layout.limit),
        "ACTIVATION": layout.activation,
    }


def _arithmetic(layout: Block) -> tuple[float, float, float]:
    limit = layout.limit if math.isfinite(layout.limit) else 0.0
    return float(layout.alpha), float(limit), float(layout.up_offset)


def _run_vector(
    x: Tensor, routing: Routing, table: Tensor, slots: Tensor, layout: Block, out: Tensor
) -> None:
    from gpu_experts.cuda import triton_kernels as kernels

    fp, strips = layout.padded_intermediate, pad(layout.hidden, TILE) // TILE
    h = torch.empty(routing.pairs, fp, dtype=torch.float32, device=x.device)
    common = {"STRIPS": 1, "GROUPS": 8, "num_warps": 4}
    kernels.up_vector[(routing.pairs, fp // TILE)](
        x,
        slots,
        table,
        h,
        routing.pairs,
        routing.users,
        layout.hidden,
        pad(layout.hidden, GROUP) // GROUP,
        fp // TILE,
        layout.stride // 16,
        layout.bias_offset // 16,
        *_arithmetic(layout),
        **_up_constants(layout),
        **common,
    )
    kernels.down_vector[(routing.users, strips)](
        h,
        slots,
        table,
        out,
        routing.pairs,
        routing.users,
        fp,
        layout.hidden,
        fp // GROUP,
        strips,
        layout.stride // 16,
        layout.down_offset // 16,
        layout.down_bias_offset // 16,
        FMT=layout.format,
        BIAS=layout.bias,
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
    match fmt:
        case "q4_0":  # [span, group, half, chunk, byte] -> [span, half, byte, group, chunk]
            split = padded.reshape(tokens, spans, 4, 2, 4, 4).permute(0, 1, 3, 5, 2, 4)
        case "q8_0":  # [span, group, chunk, byte] -> [span, byte, group, chunk]
            split = padded.reshape(tokens, spans, 4, 8, 4).permute(0, 1, 4, 2, 3)
        case _:
            raise FormatError(f"the matrix kernels do not read {fmt}")
    return split.reshape(tokens, spans * SPAN)


def _run_matrix(
    x: Tensor, routing: Routing, table: Tensor, slots: Tensor, layout: Block, out: Tensor
) -> None:
    from gpu_experts.cuda import triton_kernels as kernels

    fp, strips = layout.padded_intermediate, pad(layout.hidden, TILE) // TILE
    inputs = x
    if routing.users < len(x):
        inputs = x[routing.token_of(table).to(x.device, non_blocking=True)]
    inputs = permute_inputs(inputs, layout.format)
    h = torch.empty(routing.pairs, pad(fp, SPAN), dtype=x.dtype, device=x.device)
    y = torch.empty(routing.pairs, layout.hidden, dtype=torch.float32, device=x.device)
    # Gate and up are two accumulators: half as many rows of each as of down.
    across = 2
    common = {"ROWS": routing.tile_rows, "num_warps": 4, "num_stages": 2}
    kernels.up_matrix[(routing.tiles, -(-fp // (TILE * across)))](
        inputs,
        slots,
        table,
        h,
        routing.pairs,
        routing.users,
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
        slots,
        table,
        y,
        routing.pairs,
        routing.users,
        h.shape[1],
        layout.hidden,
        fp // GROUP,
        strips,
        layout.stride // 16,
        layout.down_offset // 16,
        layout.down_bias_offset // 16,
        FMT=layout.format,
        BIAS=layout.bias,
        STRIPS=2 * across,
        **common,
    )
    block = 256
    kernels.add_pairs[(routing.users, -(-layout.hidden // block))](
        y,
        table,
        out,
        routing.pairs,
        routing.users,
        layout.hidden,
        BLOCK=block,
    )


def add_host(out: Tensor, host: Tensor, total: Tensor) -> None:
    """Write ``out + host``, both float32, into ``total`` of any type; Triton's.

    ``host`` may be pinned: a kernel reads that by itself, without waiting for the engine that
    copies.
    """
    from gpu_experts.cuda import triton_kernels as kernels

    block = 512
    kernels.add_host[(-(-out.numel() // block),)](out, host, total, out.numel(), BLOCK=block)
