"""What a call of the kernels needs besides its arguments: memory that is used again, sorted pairs.

Who uses it holds the lock of :mod:`cpu_experts.jit.workers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_experts.kernels import experts as kernels
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import F32, U8, pad

Ids = NDArray[np.int32] | NDArray[np.int64]


@dataclass
class Workspace:
    """Named buffers, each as large as the largest call so far asked for.

    ``addresses`` are those of the buffers of :data:`kernels.BUFFERS`, in their order; ``fits``
    are the sizes that they were last made large enough for.
    """

    buffers: dict[str, U8] = field(default_factory=dict)
    addresses: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(kernels.BUFFERS), np.int64)
    )
    fits: tuple[int, ...] = ()

    def get(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        self.reserve(name, size * np.dtype(dtype).itemsize)
        return self.buffers[name].view(dtype)

    def reserve(self, name: str, n_bytes: int) -> None:
        """Make a buffer at least ``n_bytes`` large, whole cache lines."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.size < n_bytes:
            size = pad(max(n_bytes, 1), 64)
            memory = np.zeros(size + 64, np.uint8)
            start = -memory.ctypes.data % 64
            buffer = self.buffers[name] = memory[start : start + size]
            if name in kernels.BUFFERS:
                self.addresses[kernels.BUFFERS.index(name)] = buffer.ctypes.data

    def rows(self, name: str, count: int, width: int, dtype: Any) -> NDArray[Any]:
        """Return ``[count, width]`` of a buffer, a row a thread."""
        return self.get(name, count * width, dtype)[: count * width].reshape(count, width)

    def scratch(self, threads: int) -> F32:
        """Scratch rows of the threads."""
        return self.rows("scratch", threads, kernels.SCRATCH_WIDTH, np.float32)


WORKSPACE = Workspace()


def sorted_pairs(expert_ids: Ids, num_experts: int) -> tuple[int, Any, Any, Any]:
    """Sort the router's choice by expert: active experts, their ids, their runs, the pairs."""
    flat = np.ascontiguousarray(expert_ids.reshape(-1), dtype=np.int64)
    experts = WORKSPACE.get("experts", num_experts + 1, np.int64)
    first = WORKSPACE.get("first", num_experts + 1, np.int64)[: num_experts + 1]
    pairs = WORKSPACE.get("pairs", max(flat.size, 1), np.int32)
    return kernels.sort_pairs(flat, num_experts, experts, first, pairs), experts, first, pairs


def check_ids(expert_ids: Ids, tokens: int) -> None:
    if expert_ids.ndim != 2 or expert_ids.shape[0] != tokens or expert_ids.dtype.kind not in "iu":
        raise ShapeError(
            f"expert_ids are {expert_ids.dtype} {list(expert_ids.shape)} for {tokens} tokens;"
            f" they must be integers [{tokens}, choices]"
        )


def read_only(weights: U8) -> U8:
    """A flat view that kernels cannot write: one compiled signature for mapped and own memory."""
    flat = weights.reshape(-1)
    flat.flags.writeable = False
    return flat
