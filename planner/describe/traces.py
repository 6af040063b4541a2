"""Reads recorded routing: the experts that every token of a text used in every layer."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.errors import TraceError

_DAMAGE = (
    *(OSError, ValueError, EOFError, TypeError, MemoryError, RecursionError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged archive of arrays raises."""


def read_trace(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ``expert_ids`` and ``routing_weights`` of a trace file, both ``[T, L, A]``.

    Raises
    ------
    TraceError
        When the file is missing, damaged, or lacks an array.
    """
    if not path.is_file():
        raise TraceError(f"there is no file {path}", hint="check the path")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids = np.asarray(arrays["expert_ids"])
            weights = np.asarray(arrays["routing_weights"], dtype=np.float32)
    except KeyError as error:
        raise TraceError(
            f"{path} lacks an array: {error.args[0]}",
            hint="a trace has expert_ids and routing_weights, both [tokens, layers, top_k]",
        ) from error
    except _DAMAGE as error:
        raise TraceError(
            f"{path} cannot be read as a routing trace: {error}",
            hint="the file may be cut short: record or copy it again",
        ) from error
    if ids.ndim != 3 or ids.shape != weights.shape or ids.dtype.kind not in "iu":
        raise TraceError(
            f"{path}: expert_ids is {ids.dtype}{list(ids.shape)}, "
            f"routing_weights is {list(weights.shape)}",
            hint="both must be [tokens, layers, top_k], the ids whole numbers",
        )
    return ids.astype(np.int64), weights
