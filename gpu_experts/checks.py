"""What every device does with a call's arguments before it enqueues anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_experts.device import F32, I32
from gpu_experts.errors import DeviceFailedError, ShapeError, SlotError
from hybrid.formats.block import Block


def opened(layout: Block | None) -> Block:
    """Return the layout of an open device.

    Raises
    ------
    DeviceFailedError
        When the device is closed or was never opened.
    """
    if layout is None:
        raise DeviceFailedError("the device has no slots", hint="call open() first")
    return layout


def check_slots(layout: Block) -> None:
    """Raise ShapeError when experts of this layout do not lie in slots."""
    if not layout.stride:
        raise ShapeError("a layout without a stride has no slots", hint="use Block.with_stride()")


def check_copy(layout: Block, slots: int, block: Any, slot: int) -> None:
    """Raise SlotError or ShapeError when ``block`` cannot go into ``slot``."""
    if not 0 <= slot < slots:
        raise SlotError(f"no slot {slot} on a device with {slots} slots")
    if block.dtype != np.uint8 or block.ndim != 1 or not block.flags.c_contiguous:
        raise ShapeError(f"a block is contiguous uint8 [bytes], got {block.dtype} {block.shape}")
    if block.size < layout.block_bytes:
        raise ShapeError(f"a block takes {layout.block_bytes} bytes, got {block.size}")


def check_compute(
    layout: Block, slots: int, x: Tensor, slot_ids: Any, routing_weights: Any, out: Tensor
) -> dict[int, int]:
    """Return the tokens of each slot that a compute uses.

    Raises
    ------
    SlotError, ShapeError
        When its arguments contradict each other.
    """
    shape = x.shape
    if len(shape) != 2 or shape[1] != layout.hidden or not x.dtype.is_floating_point:
        raise ShapeError(f"x is {x.dtype} {list(shape)}; it must be floating [T, {layout.hidden}]")
    if out.dtype is not torch.float32 or out.shape != shape or not out.is_contiguous():
        raise ShapeError(
            f"out is {out.dtype} {list(out.shape)}; it must be contiguous float32 {list(shape)}"
        )
    return _loads_of(shape[0], slots, slot_ids, routing_weights)


def _loads_of(tokens: int, slots: int, slot_ids: Any, routing_weights: Any) -> dict[int, int]:
    """Count the tokens of each slot."""
    if isinstance(slot_ids, list):
        loads = dict.fromkeys(slot_ids, 1)
        if tokens != 1 or not len(loads) == len(slot_ids) == len(routing_weights):
            raise ShapeError(
                f"{slot_ids} and {len(routing_weights)} weights for {tokens} tokens; a list must"
                " be different slots of one token, with a weight each"
            )
        if loads and (min(loads) < 0 or max(loads) >= slots):
            raise _outside(min(loads), max(loads), slots)
        return loads
    if slot_ids.ndim != 2 or slot_ids.shape[0] != tokens or slot_ids.dtype.kind not in "iu":
        raise ShapeError(
            f"slot_ids are {slot_ids.dtype} {list(slot_ids.shape)} for {tokens} tokens;"
            f" they must be integers [{tokens}, choices]"
        )
    if routing_weights.shape != slot_ids.shape or routing_weights.dtype != np.float32:
        raise ShapeError(
            f"routing_weights are {routing_weights.dtype} {list(routing_weights.shape)};"
            f" they must be float32 {list(slot_ids.shape)}"
        )
    if not slot_ids.size:
        return {}
    least, most = int(slot_ids.min()), int(slot_ids.max())
    if least < -1 or most >= slots:
        raise _outside(least, most, slots)
    counts = np.bincount(slot_ids.reshape(-1) + 1)[1:]  # the first are those elsewhere
    used = np.flatnonzero(counts)
    return dict(zip(used.tolist(), counts[used].tolist(), strict=True))


def _outside(least: int, most: int, slots: int) -> SlotError:
    return SlotError(f"slot ids from {least} to {most} on a device with {slots} slots")


def as_arrays(slot_ids: I32 | list[int], routing_weights: F32 | list[float]) -> tuple[I32, F32]:
    """Return a compute's slots and weights ``[T, A]``, in memory of their own."""
    ids, weights = np.array(slot_ids, np.int32), np.array(routing_weights, np.float32)
    return (ids, weights) if ids.ndim == 2 else (ids[None], weights[None])


def on_host(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor in host memory as an array, floating ones as float32, C-contiguous."""
    tensor = tensor.detach()
    if tensor.dtype.is_floating_point:
        tensor = tensor.float()
    found: NDArray[Any] = tensor.contiguous().numpy()
    return found


def require_content(slots: Iterable[int], written: Mapping[int, object]) -> None:
    """Raise SlotError when one of ``slots`` was never copied into."""
    empty = [slot for slot in slots if slot not in written]
    if empty:
        raise SlotError(f"nothing was copied into slots {sorted(empty)}", hint="call copy() first")
