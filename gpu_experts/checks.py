"""What every device checks of a call before it enqueues anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_experts.errors import DeviceFailedError, ShapeError, SlotError
from gpu_experts.layout import BlockLayout


def opened(layout: BlockLayout | None) -> BlockLayout:
    """Return the layout of an open device.

    Raises
    ------
    DeviceFailedError
        When the device is closed or was never opened.
    """
    if layout is None:
        raise DeviceFailedError("the device has no slots", hint="call open() first")
    return layout


def check_copy(layout: BlockLayout, slots: int, block: Any, slot: int) -> None:
    """Raise SlotError or ShapeError when ``block`` cannot go into ``slot``."""
    if not 0 <= slot < slots:
        raise SlotError(f"no slot {slot} on a device with {slots} slots")
    if block.dtype != np.uint8 or block.ndim != 1 or not block.flags.c_contiguous:
        raise ShapeError(f"a block is contiguous uint8 [bytes], got {block.dtype} {block.shape}")
    if block.size < layout.block_bytes:
        raise ShapeError(f"a block takes {layout.block_bytes} bytes, got {block.size}")


def check_compute(
    layout: BlockLayout, slots: int, x: Tensor, slot_ids: Any, routing_weights: Any, out: Tensor
) -> None:
    """Raise SlotError or ShapeError when a compute's arguments contradict each other."""
    if x.ndim != 2 or x.shape[1] != layout.hidden or not x.is_floating_point():
        raise ShapeError(
            f"x is {x.dtype} {list(x.shape)}; it must be floating [T, {layout.hidden}]"
        )
    tokens = x.shape[0]
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
    if out.dtype != torch.float32 or out.shape != x.shape or not out.is_contiguous():
        raise ShapeError(
            f"out is {out.dtype} {list(out.shape)}; it must be contiguous float32 {list(x.shape)}"
        )
    if not slot_ids.size:
        return
    # One token's few ids are looked at faster one by one.
    ids = slot_ids if slot_ids.size > 64 else slot_ids.ravel().tolist()
    low, high = (min(ids), max(ids)) if isinstance(ids, list) else (ids.min(), ids.max())
    if not -1 <= low <= high < slots:
        raise SlotError(f"slot ids from {low} to {high} on a device with {slots} slots")


def require_content(slots: Iterable[int], written: Mapping[int, object]) -> None:
    """Raise SlotError when one of ``slots`` was never copied into."""
    empty = sorted(slot for slot in slots if slot not in written)
    if empty:
        raise SlotError(f"nothing was copied into slots {empty}", hint="call copy() first")
