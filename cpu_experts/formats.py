"""Weight formats: how a matrix is quantized and how it is laid out for the kernels.

A matrix ``[N, K]`` (N output rows, K inputs) is cut into strips of ``TILE`` = 16 rows. The
numbers of one strip lie together, so that a kernel streams a strip from memory while the 16
outputs stay in registers. Rows are padded to 16 with zeros; for the quantized formats K is
padded to ``GROUP`` = 32 with zeros, which contribute nothing.

========  =============================================================================
format    one strip
========  =============================================================================
``q4_0``  per group of 32 inputs 288 bytes: four 64-byte chunks, then the 16 rows' fp16
          scales. Byte ``4 r + b`` of chunk ``j`` holds input ``4 j + b`` of row ``r`` in
          its low nibble and input ``16 + 4 j + b`` in its high nibble. value = d (q - 8)
``q8_0``  per group 544 bytes: eight 64-byte chunks of int8, then the scales. Byte
          ``4 r + b`` of chunk ``j`` holds input ``4 j + b`` of row ``r``. value = d q
``bf16``  per input 16 bfloat16, one a row
``f32``   per input 16 float32, one a row
========  =============================================================================

``q4_0`` and ``q8_0`` carry the same numbers as GGUF's formats of these names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_experts.errors import FormatError, ShapeError

GROUP = 32
TILE = 16
#: Bytes of a group of quantized activations: the codes, a float32 scale and a start value.
ACT_GROUP = GROUP + 8
#: Groups of no larger magnitude count as zero: the inverse of their scale would overflow.
TINY = 1e-30

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I8 = NDArray[np.int8]

#: Bytes that one strip takes per unit of K, and how many inputs that unit holds.
_UNIT = {
    "q4_0": (TILE * (GROUP // 2 + 2), GROUP),
    "q8_0": (TILE * (GROUP + 2), GROUP),
    "bf16": (TILE * 2, 1),
    "f32": (TILE * 4, 1),
}
FORMATS = tuple(_UNIT)


def check_format(name: str) -> str:
    """Return ``name`` if it is a known format, else raise :class:`FormatError`."""
    if name not in _UNIT:
        raise FormatError(
            f"unknown weight format {name!r}", hint=f"choose one of: {', '.join(FORMATS)}"
        )
    return name


def is_quantized(fmt: str) -> bool:
    """Whether ``fmt`` has groups and scales (and so takes int8 activations)."""
    return _UNIT[check_format(fmt)][1] == GROUP


def pad(n: int, multiple: int) -> int:
    """Round ``n`` up to a multiple."""
    return -(-n // multiple) * multiple


def strip_bytes(cols: int, fmt: str) -> int:
    """Bytes of one strip of 16 rows and ``cols`` inputs."""
    size, inputs = _UNIT[check_format(fmt)]
    return size * (pad(cols, inputs) // inputs)


def packed_bytes(rows: int, cols: int, fmt: str) -> int:
    """Bytes of a packed matrix ``[rows, cols]``, padding included."""
    return pad(rows, TILE) // TILE * strip_bytes(cols, fmt)


def quantize(w: F32, fmt: str) -> tuple[I8, NDArray[np.float16]]:
    """Quantize the rows of ``w`` in groups of 32 inputs.

    Parameters
    ----------
    w
        ``[N, K]`` float32, K a multiple of 32.
    fmt
        ``"q4_0"`` (codes 0..15, value ``d * (q - 8)``) or ``"q8_0"`` (codes -127..127,
        value ``d * q``).

    Returns
    -------
    codes int8 ``[N, K]`` and scales float16 ``[N, K / 32]``.

    Notes
    -----
    The same rules, in the same float32 operations, as ggml's reference quantizers: q4_0
    divides the value of largest magnitude, sign included, by -8; q8_0 divides the largest
    magnitude by 127 and rounds halves away from zero.
    """
    rows, cols = w.shape
    groups = w.reshape(rows, cols // GROUP, GROUP)
    if not np.isfinite(w).all():
        raise FormatError(
            f"{np.count_nonzero(~np.isfinite(w))} of {w.size} weights are infinite or NaN",
            hint="the source is damaged; bf16 and f32 would keep such values",
        )
    if fmt == "q4_0":
        at = np.argmax(np.abs(groups), axis=-1)[..., None]
        d = np.take_along_axis(groups, at, axis=-1)[..., 0] / np.float32(-8)
        codes = np.clip(groups * _inverse(d)[..., None] + np.float32(8.5), 0, 15)
    elif fmt == "q8_0":
        d = np.max(np.abs(groups), axis=-1) / np.float32(127)
        scaled = groups * _inverse(d)[..., None]
        whole = np.trunc(scaled)
        codes = whole + np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), 0)
    else:
        raise FormatError(f"format {fmt!r} has no codes", hint="choose one of: q4_0, q8_0")
    with np.errstate(over="ignore"):
        scales = d.astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(
            f"weights up to {np.abs(w).max():.3g} have no fp16 scale in {fmt}",
            hint="use bf16 or f32 for weights this large",
        )
    return codes.astype(np.int8).reshape(rows, cols), scales


def _inverse(d: F32) -> F32:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > TINY)


def _padded(w: NDArray[Any], cols: int) -> NDArray[Any]:
    rows = pad(w.shape[0], TILE)
    if w.shape == (rows, cols):
        return w
    out = np.zeros((rows, cols), w.dtype)
    out[: w.shape[0], : w.shape[1]] = w
    return out


def pack(w: F32, fmt: str, out: U8 | None = None) -> U8:
    """Quantize ``w`` ``[N, K]`` float32 and lay it out in strips.

    Parameters
    ----------
    out
        Where to write, uint8 of :func:`packed_bytes`; allocated when missing.

    Raises
    ------
    ShapeError
        When ``w`` is not a float32 matrix or ``out`` has another size.
    FormatError
        On an unknown format or weights that have no finite scale.
    """
    size, inputs = _UNIT[check_format(fmt)]
    if w.ndim != 2 or w.dtype != np.float32:
        raise ShapeError(f"pack takes a float32 matrix, got {w.dtype} {list(w.shape)}")
    total = packed_bytes(w.shape[0], w.shape[1], fmt)
    if out is None:
        out = np.empty(total, np.uint8)
    elif out.dtype != np.uint8 or out.shape != (total,):
        raise ShapeError(f"packed {fmt} {list(w.shape)} takes {total} bytes, got {out.shape}")
    padded = _padded(w, pad(w.shape[1], inputs))
    strips = padded.shape[0] // TILE
    if not is_quantized(fmt):
        values = to_bf16(padded) if fmt == "bf16" else padded
        tiles = np.ascontiguousarray(values.reshape(strips, TILE, -1).transpose(0, 2, 1))
        out[:] = tiles.view(np.uint8).reshape(-1)
        return out
    codes, scales = quantize(padded, fmt)
    units = out.reshape(strips, -1, size)
    # [strip, row, group, chunk, byte] -> [strip, group, chunk, row, byte]
    q = codes.view(np.uint8).reshape(strips, TILE, -1, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
    if fmt == "q4_0":
        q = np.bitwise_or(q[:, :, :4], q[:, :, 4:] << 4, dtype=np.uint8)
    units[:, :, : size - 2 * TILE] = q.reshape(strips, -1, size - 2 * TILE)
    d = np.ascontiguousarray(scales.reshape(strips, TILE, -1).transpose(0, 2, 1))
    units[:, :, size - 2 * TILE :] = d.view(np.uint8)
    return out


def unpack(buf: U8, rows: int, cols: int, fmt: str) -> F32:
    """Return the float32 ``[rows, cols]`` that the kernels compute with.

    Raises
    ------
    FormatError
        When ``buf`` is not what ``rows``, ``cols`` and ``fmt`` take.
    """
    size, _ = _UNIT[check_format(fmt)]
    total = packed_bytes(rows, cols, fmt)
    if buf.dtype != np.uint8 or buf.size != total:
        raise FormatError(
            f"packed {fmt} [{rows}, {cols}] takes {total} bytes, the buffer has {buf.size}"
        )
    strips = pad(rows, TILE) // TILE
    if not is_quantized(fmt):
        kind = np.uint16 if fmt == "bf16" else np.float32
        numbers: NDArray[Any] = np.ascontiguousarray(buf).view(kind)
        flat = numbers.reshape(strips, -1, TILE).transpose(0, 2, 1).reshape(strips * TILE, -1)
        values = from_bf16(flat) if fmt == "bf16" else flat
        return np.ascontiguousarray(values[:rows, :cols])
    units = buf.reshape(strips, -1, size)
    q = units[:, :, : size - 2 * TILE].reshape(strips, units.shape[1], -1, TILE, 4)
    if fmt == "q4_0":
        codes: I8 = np.concatenate((q & 15, q >> 4), axis=2).view(np.int8) - np.int8(8)
    else:
        codes = q.view(np.int8)
    d = np.ascontiguousarray(units[:, :, size - 2 * TILE :]).view(np.float16).astype(np.float32)
    values = codes.transpose(0, 3, 1, 2, 4) * d.transpose(0, 2, 1)[..., None, None]
    return np.ascontiguousarray(values.reshape(strips * TILE, -1)[:rows, :cols])


def unpack_rows(buf: U8, cols: int, fmt: str, rows: NDArray[np.int64]) -> F32:
    """Return single rows ``[len(rows), cols]`` of a packed matrix, all within its bounds."""
    size, inputs = _UNIT[check_format(fmt)]
    units = buf.reshape(-1, pad(cols, inputs) // inputs, size)[rows // TILE]
    at, row = np.arange(len(rows)), rows % TILE
    if not is_quantized(fmt):
        numbers: NDArray[Any] = units.view(np.uint16 if fmt == "bf16" else np.float32)[at, :, row]
        return from_bf16(numbers) if fmt == "bf16" else numbers
    codes = units[:, :, : size - 2 * TILE].reshape(len(rows), units.shape[1], -1, TILE, 4)
    q = codes[at, :, :, row]
    if fmt == "q4_0":
        values: I8 = np.concatenate((q & 15, q >> 4), axis=2).view(np.int8) - np.int8(8)
    else:
        values = q.view(np.int8)
    d = np.ascontiguousarray(units[:, :, size - 2 * TILE :]).view(np.float16)[at, :, row]
    wide = values.reshape(*d.shape, GROUP) * d.astype(np.float32)[..., None]
    return np.ascontiguousarray(wide.reshape(len(rows), -1)[:, :cols])


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, halves to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    """Widen bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize_activations(x: F32) -> tuple[I8, F32]:
    """Quantize the kernels' int8 activations: groups of 32, scale = max|x| / 127.

    Parameters
    ----------
    x
        ``[T, K]`` float32.

    Returns
    -------
    codes int8 ``[T, Kp]`` and scales float32 ``[T, Kp / 32]``, Kp = K rounded up to 32; the
    kernels' numbers exactly (halves round to even).
    """
    padded = np.zeros((x.shape[0], pad(x.shape[1], GROUP)), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(x.shape[0], -1, GROUP)
    largest = np.max(np.abs(groups), axis=-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > TINY)
    codes = np.rint(groups * inverse[..., None]).astype(np.int8)
    return codes.reshape(padded.shape), largest / np.float32(127)


def round_activations(x: F32) -> F32:
    """What the int8 kernels see of ``x`` ``[T, K]``: quantized and widened again."""
    codes, scales = quantize_activations(x)
    groups = codes.reshape(*scales.shape, GROUP) * scales[..., None]
    return np.ascontiguousarray(groups.reshape(codes.shape)[:, : x.shape[1]])
