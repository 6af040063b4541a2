"""What every entry to the kernels checks of the arrays that it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrid.formats.errors import ShapeError

_FLOAT = np.dtype(np.float32)


def check_matrix(name: str, x: Any, shape: tuple[int | None, ...]) -> None:
    """Raise ShapeError unless ``x`` is contiguous float32 of ``shape``, None being any size."""
    if x.dtype == _FLOAT and x.flags.c_contiguous and x.ndim == len(shape):
        for want, size in zip(shape, x.shape, strict=True):
            if want is not None and want != size:
                break
        else:
            return
    sizes = ["any" if want is None else want for want in shape]
    order = "" if x.flags.c_contiguous else ", not C-contiguous"
    raise ShapeError(
        f"{name} is {x.dtype} {list(x.shape)}{order}; it must be float32 {sizes}, C-contiguous"
    )


def check_floats(name: str, array: Any, size: int) -> None:
    """Raise ShapeError unless ``array`` is None or a contiguous float32 vector of ``size``."""
    if array is None:
        return
    if array.dtype != np.float32 or array.shape != (size,) or not array.flags.c_contiguous:
        raise ShapeError(
            f"{name} is {array.dtype} {list(array.shape)}; it must be float32 [{size}], contiguous"
        )


def check_packed(weight: Any, rows: int, cols: int, fmt: str, size: int) -> None:
    """Raise ShapeError unless ``weight`` is a packed matrix ``[rows, cols]`` of ``size`` bytes."""
    if weight.dtype != np.uint8 or weight.shape != (size,) or not weight.flags.c_contiguous:
        raise ShapeError(
            f"weight is {weight.dtype} {list(weight.shape)}; {fmt}"
            f" [{rows}, {cols}] takes uint8 [{size}], C-contiguous"
        )
