"""Groups: what the quantized formats share, codes of 32 inputs under scales of their row.

A unit holds one group, or a super-block of eight, of 16 rows: the groups' codes, then the groups'
own scales (sub-scales: a byte or two a row, integers or tiny floats), then the rows' scales.

Codes lie in planes of 1, 2, 4 or 8 bits, the lowest bits of a code first, and a plane of b bits in
b chunks of 64 bytes a group: byte ``4 r + i`` of a chunk belongs to row ``r``. The eight fours of a
group's inputs go through a plane's chunks and, within a chunk, from low bits to high ones, in the
order 0, 16, 4, 20, 8, 24, 12, 28 (where a four begins), so that the first half of a group is in
even places; a plane of 8 bits has them in their own order. Field ``i`` of a byte is input ``i`` of
its four.

All of a unit's bytes 0 are weights of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.formats.errors import FormatError
from hybrid.formats.strips import F32, GROUP, I64, SUPER, TILE, U8, Format, Layout

#: Groups of no larger magnitude count as zero: the inverse of their scale would overflow.
TINY = 1e-30
#: Groups of a super-block.
GROUPS = SUPER // GROUP

F16 = NDArray[np.float16]
_FOURS = GROUP // 4
#: Weights that are quantized at once: what lies between float32 and codes stays in the caches.
_AT_ONCE = 1 << 17


class Fields(NamedTuple):
    """What a unit is made of; N rows, U units of G groups.

    ``codes`` are uint8 ``[N, U, G, 32]``, ``subs`` the groups' own bytes ``[N, U, G, B]`` (B may
    be 0), ``scales`` the rows' numbers, each ``[N, U]``.
    """

    codes: U8
    subs: U8
    scales: tuple[NDArray[Any], ...]


def store(layout: Layout, fields: Fields) -> U8:
    """Lay out whole strips: uint8 ``[N / 16, U, unit_bytes]``."""
    rows, units = fields.codes.shape[:2]
    strips = rows // TILE
    out = np.empty((strips, units, layout.unit_bytes), np.uint8)
    codes = fields.codes.reshape(strips, TILE, units, layout.groups, _FOURS, 4)
    chunks = [
        _store_plane(codes >> np.uint8(shift), bits)
        for shift, bits in zip(layout.shifts, layout.planes, strict=True)
    ]
    parts = [np.concatenate(chunks, axis=4).transpose(0, 2, 3, 4, 1, 5)]
    subs = fields.subs.reshape(strips, TILE, units, layout.groups, layout.subs)
    parts.append(subs.transpose(0, 2, 3, 4, 1))
    for kind, scales in zip(layout.scales, fields.scales, strict=True):
        own = scales.astype(kind, copy=False).reshape(strips, TILE, units, 1)
        parts.append(own.view(np.uint8).reshape(strips, TILE, units, -1).swapaxes(1, 2))
    at = 0
    for part in parts:
        flat = np.ascontiguousarray(part).reshape(strips, units, -1)
        out[..., at : at + flat.shape[2]] = flat
        at += flat.shape[2]
    return out


def load(layout: Layout, units: U8) -> Fields:
    """Inverse of :func:`store`."""
    return _load(layout, units, lambda part: part.reshape(len(part) * TILE, *part.shape[2:]))


def load_rows(layout: Layout, units: U8, rows: I64) -> Fields:
    """Fields of one row a strip: units ``[n, U, unit_bytes]``, rows ``[n]``."""
    at = np.arange(len(rows))
    return _load(layout, units, lambda part: part[at, rows])


def _load(layout: Layout, units: U8, pick: Callable[[NDArray[Any]], NDArray[Any]]) -> Fields:
    """Fields of the rows that ``pick`` takes of ``[S, 16, ...]``."""
    strips, count = units.shape[:2]
    raw = units[..., : layout.subs_at].reshape(strips, count, layout.groups, -1, TILE, 4)
    chunks = pick(raw.transpose(0, 4, 1, 2, 3, 5))
    codes, at = np.zeros((*chunks.shape[:3], _FOURS, 4), np.uint8), 0
    for shift, bits in zip(layout.shifts, layout.planes, strict=True):
        codes |= _load_plane(chunks[..., at : at + bits, :], bits) << np.uint8(shift)
        at += bits
    raw = units[..., layout.subs_at : layout.scales_at]
    subs = pick(
        raw.reshape(strips, count, layout.groups, layout.subs, TILE).transpose(0, 4, 1, 2, 3)
    )
    scales, at = [], layout.scales_at
    for kind in layout.scales:
        raw = np.ascontiguousarray(units[..., at : at + TILE * kind.itemsize])
        scales.append(pick(raw.view(kind).swapaxes(1, 2)))
        at += TILE * kind.itemsize
    return Fields(codes.reshape(*codes.shape[:3], GROUP), subs, tuple(scales))


def _store_plane(fours: U8, bits: int) -> U8:
    """Chunks ``[..., bits, 4]`` of a plane, of codes ``[..., 8, 4]``."""
    steps = fours[..., _order(bits), :].reshape(*fours.shape[:-2], bits, 8 // bits, 4)
    steps = steps & np.uint8(2**bits - 1)
    chunks: U8 = np.bitwise_or.reduce(steps << _fields(bits), axis=-2)
    return chunks


def _load_plane(chunks: U8, bits: int) -> U8:
    """Inverse of :func:`_store_plane`."""
    steps = (chunks[..., None, :] >> _fields(bits)) & np.uint8(2**bits - 1)
    fours = np.empty((*chunks.shape[:-2], _FOURS, 4), np.uint8)
    fours[..., _order(bits), :] = steps.reshape(fours.shape)
    return fours


def _fields(bits: int) -> U8:
    """How far the fields of a byte are shifted, ``[8 / bits, 1]``."""
    return np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def _order(bits: int) -> list[int]:
    """The fours of a group as they go through a plane."""
    return list(range(8)) if bits == 8 else [0, 4, 1, 5, 2, 6, 3, 7]


def grouped(
    name: str,
    layout: Layout,
    *,
    quantize: Callable[[F32, F32 | None], Fields],
    values: Callable[[Fields], F32],
    blocks: Callable[[U8], Fields] | None = None,
    block_bytes: int = 0,
    block_inputs: int = 0,
    hold: Callable[[NDArray[Any]], tuple[Fields, bool] | None] | None = None,
    advised: bool = False,
) -> Format:
    """Return a format of groups.

    Parameters
    ----------
    quantize
        Turns float32 ``[N, U, G, 32]`` into fields; given what their inputs' errors count for, as
        many numbers as a row has inputs, with regard to these.
    values
        Turns fields into float32 ``[N, U, G, 32]``, in the operations that GGUF's library makes.
    blocks
        Turns the bytes of GGUF's blocks ``[N, B, block_bytes]`` into fields of whole units; None
        where GGUF has no such type.
    block_inputs
        What a block of GGUF holds; as a unit where it is not given.
    hold
        Turns elements (:mod:`hybrid.formats.elements`) ``[N, U, G, 32]`` into fields of the same
        numbers, and whether no scale was rounded; None where it cannot.
    """
    inputs = GROUP * layout.groups

    def pack(w: F32) -> U8:
        return weigh(w, None)

    def weigh(w: F32, columns: F32 | None) -> U8:
        strips, _, cols = w.shape
        _check_finite(w)
        units = np.empty((strips, cols // inputs, layout.unit_bytes), np.uint8)
        step = max(1, _AT_ONCE // (TILE * cols))
        for at in range(0, strips, step):
            rows = w[at : at + step].reshape(-1, cols)
            fields = quantize(rows.reshape(len(rows), -1, layout.groups, GROUP), columns)
            units[at : at + step] = store(layout, fields)
        return units

    def unpack(units: U8) -> F32:
        return values(load(layout, units)).reshape(len(units), TILE, -1)

    def unpack_rows(units: U8, rows: I64) -> F32:
        return values(load_rows(layout, units, rows)).reshape(len(units), -1)

    def repack(raw: U8) -> U8:
        assert blocks is not None
        step = max(1, _AT_ONCE // (TILE * raw.shape[2]))
        found = []
        for at in range(0, len(raw), step):
            some = raw[at : at + step].reshape(-1, raw.shape[2] // block_bytes, block_bytes)
            found.append(store(layout, blocks(some)))
        return np.concatenate(found)

    def held(of: NDArray[Any]) -> tuple[U8, bool] | None:
        assert hold is not None
        units = np.empty((len(of) // TILE, of.shape[1] // inputs, layout.unit_bytes), np.uint8)
        exact = True
        step = TILE * max(1, _AT_ONCE // (TILE * of.shape[1]))
        for at in range(0, len(of), step):
            some = of[at : at + step]
            found = hold(some.reshape(len(some), -1, layout.groups, GROUP))
            if found is None:
                return None
            units[at // TILE : (at + len(some)) // TILE] = store(layout, found[0])
            exact = exact and found[1]
        return units, exact

    return Format(
        name=name,
        unit_bytes=layout.unit_bytes,
        unit_inputs=inputs,
        pack=pack,
        weigh=weigh,
        unpack=unpack,
        unpack_rows=unpack_rows,
        repack=None if blocks is None else repack,
        hold=None if hold is None else held,
        layout=layout,
        block_bytes=block_bytes,
        block_inputs=block_inputs or (inputs if block_bytes else 0),
        dense=True,
        advised=advised,
    )


def _check_finite(w: F32) -> None:
    if not np.isfinite(w).all():
        raise FormatError(
            f"{np.count_nonzero(~np.isfinite(w))} of {w.size} weights are infinite or NaN",
            hint="the source is damaged; bf16 and f32 would keep such values",
        )


def no_subs(codes: U8) -> U8:
    """The sub-scales of a format that has none."""
    return np.empty((*codes.shape[:3], 0), np.uint8)


def inverse(d: F32) -> F32:
    """Return ``1 / d``; 0 where ``d`` is too small for it."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > TINY)


def half_scales(d: F32, groups: NDArray[Any], name: str) -> F16:
    """Return scales in half precision.

    Raises
    ------
    FormatError
        When one is too large for it.
    """
    with np.errstate(over="ignore"):
        scales = d.astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(
            f"weights up to {np.abs(groups).max():.3g} have no fp16 scale in {name}",
            hint="use bf16 or f32 for weights this large",
        )
    return scales
