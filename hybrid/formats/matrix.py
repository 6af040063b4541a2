"""Packed matrices: float32 ``[N, K]`` to strips of a format and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.elements import Elements, zero_of
from hybrid.formats.errors import FormatError, ShapeError
from hybrid.formats.registry import format_of
from hybrid.formats.strips import F32, I64, TILE, U8, pad

#: What an input counts for at least, in parts of the mean.
_LEAST = np.float32(1e-3)


def packed_bytes(rows: int, cols: int, fmt: str) -> int:
    """Bytes of a packed matrix ``[rows, cols]``, padding included."""
    return pad(rows, TILE) // TILE * format_of(fmt).strip_bytes(cols)


def _padded(w: NDArray[Any], cols: int) -> NDArray[Any]:
    rows = pad(w.shape[0], TILE)
    if w.shape == (rows, cols):
        return w
    out = np.zeros((rows, cols), w.dtype)
    out[: w.shape[0], : w.shape[1]] = w
    return out


def pack(w: F32, fmt: str, out: U8 | None = None, importance: F32 | None = None) -> U8:
    """Quantize ``w`` ``[N, K]`` float32 and lay it out in strips.

    Parameters
    ----------
    out
        Where to write, uint8 of :func:`packed_bytes`; allocated when missing.
    importance
        What an error of each input counts for, float32 ``[K]``: the mean squares of what the
        weights multiply. Formats whose scales are searched for find others then.

    Raises
    ------
    ShapeError
        When ``w`` is not a float32 matrix, or ``out`` or ``importance`` have another size.
    FormatError
        On an unknown format or weights that have no finite scale.
    """
    known = format_of(fmt)
    if w.ndim != 2 or w.dtype != np.float32:
        raise ShapeError(f"pack takes a float32 matrix, got {w.dtype} {list(w.shape)}")
    total = packed_bytes(w.shape[0], w.shape[1], fmt)
    if out is not None and (out.dtype != np.uint8 or out.shape != (total,)):
        raise ShapeError(f"packed {fmt} {list(w.shape)} takes {total} bytes, got {out.shape}")
    padded = _padded(w, known.units(w.shape[1]) * known.unit_inputs)
    strips = padded.reshape(-1, TILE, padded.shape[1])
    if importance is None or known.weigh is None:
        packed = known.pack(strips).reshape(-1)
    else:
        packed = known.weigh(strips, _counted(importance, w.shape[1], padded.shape[1])).reshape(-1)
    if out is None:
        return packed
    out[:] = packed
    return out


def _counted(importance: F32, cols: int, padded: int) -> F32:
    """Importances of padded inputs; those of 0 get a little, so that no weight is lost for them."""
    if importance.shape != (cols,) or importance.dtype != np.float32:
        raise ShapeError(
            f"{cols} inputs take float32 importances [{cols}], got {importance.dtype}"
            f" {list(importance.shape)}"
        )
    mean = importance.mean()
    found = np.full(padded, mean if mean > 0 else 1, np.float32)
    if mean > 0:
        found[:cols] = np.maximum(importance, _LEAST * mean)
    return found


def from_gguf(raw: U8, fmt: str) -> U8:
    """Lay out a matrix as a GGUF file holds it, losslessly.

    Parameters
    ----------
    raw
        uint8 ``[N, bytes of a row]``: blocks of the GGUF type that has the format's name.

    Returns
    -------
    uint8 as :func:`pack` makes it, of the same numbers: what :func:`unpack` gives is what GGUF's
    own library makes of ``raw``, bit for bit. Rows and inputs are padded with bytes 0, which are
    weights of 0 in every format.

    Raises
    ------
    ShapeError
        When ``raw`` is not of whole blocks.
    FormatError
        On a format that is unknown, or that GGUF does not have.
    """
    known = format_of(fmt)
    if known.repack is None:
        raise FormatError(f"GGUF has no type {fmt}")
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % known.block_bytes:
        raise ShapeError(
            f"rows of GGUF's {fmt} are uint8 [rows, a multiple of {known.block_bytes}], got"
            f" {raw.dtype} {list(raw.shape)}"
        )
    padded = _padded(raw, raw.shape[1])
    return known.repack(padded.reshape(-1, TILE, raw.shape[1])).reshape(-1)


def from_elements(of: Elements, fmt: str, rows: int) -> tuple[U8, bool] | None:
    """Lay out elements, where a format has numbers like them.

    Parameters
    ----------
    of
        ``[N, K]``, see :mod:`hybrid.formats.elements`.
    rows
        N or more: rows of zeros are appended.

    Returns
    -------
    uint8 as :func:`pack` makes it, and whether it stands for exactly the same numbers: a scale may
    be rounded. None where the format does not hold them.
    """
    known = format_of(fmt)
    if known.hold is None:
        return None
    cols = known.units(of.shape[1]) * known.unit_inputs
    found = known.hold(_filled_up(of, pad(rows, TILE), cols))
    return None if found is None else (found[0].reshape(-1), found[1])


def _filled_up(of: Elements, rows: int, cols: int) -> Elements:
    """Append zeros under the scale of the last input, so that it stays one to a group."""
    if of.shape == (rows, cols):
        return of
    filled = np.zeros((rows, cols), of.dtype)
    filled["kind"] = of["kind"][:1, :1]
    filled["number"] = zero_of(int(of["kind"][0, 0]))
    filled[: len(of), : of.shape[1]] = of
    for name in ("sub", "scale"):
        filled[name][: len(of), of.shape[1] :] = of[name][:, -1:]
    return filled


def unpack(packed: U8, rows: int, cols: int, fmt: str) -> F32:
    """Return the float32 ``[rows, cols]`` that the kernels compute with.

    Raises
    ------
    FormatError
        When ``packed`` is not what ``rows``, ``cols`` and ``fmt`` take.
    """
    known, total = format_of(fmt), packed_bytes(rows, cols, fmt)
    if packed.dtype != np.uint8 or packed.size != total:
        raise FormatError(
            f"packed {fmt} [{rows}, {cols}] takes {total} bytes, the buffer has {packed.size}"
        )
    strips = np.ascontiguousarray(packed).reshape(pad(rows, TILE) // TILE, -1, known.unit_bytes)
    values = known.unpack(strips)
    values = values.reshape(-1, values.shape[2])
    return np.ascontiguousarray(values[:rows, :cols])


def unpack_rows(packed: U8, cols: int, fmt: str, rows: I64) -> F32:
    """Return single rows ``[len(rows), cols]`` of a packed matrix, all within its bounds."""
    known = format_of(fmt)
    units = packed.reshape(-1, known.units(cols), known.unit_bytes)[rows // TILE]
    return np.ascontiguousarray(known.unpack_rows(units, rows % TILE)[:, :cols])
