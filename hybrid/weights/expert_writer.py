"""Quantizes experts piece by piece into ``experts.bin``."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.errors import CheckpointError
from hybrid.formats.block import Block
from hybrid.formats.errors import FormatError
from hybrid.formats.strips import F32, GROUP, TILE, pad
from hybrid.weights.blocks import Rows, floats, packed, values_of
from hybrid.weights.huge_pages import AlignedWriter
from hybrid.weights.importance import Importance
from hybrid.weights.partial import Partial
from hybrid.weights.source_files import few
from hybrid.weights.store import DATA_NAME, LayerRecord, StoreIndex, header_page
from hybrid.weights.weight_map import Weights

#: Values that are widened to float32 and quantized at a time: few enough to stay in the cache.
_VALUES = 1 << 17

#: Told how many bytes were written, and of what.
Advance = Callable[[int, str], None]


def write_experts(
    partial: Partial,
    weights: Weights,
    specs: list[ExpertsSpec],
    index: StoreIndex,
    advance: Advance,
    importance: Importance | None = None,
    done: Callable[[int], None] = lambda layer: None,
) -> tuple[StoreIndex, int]:
    """Write every layer's experts; return the index with checksums, and layers taken over.

    A layer that the journal calls complete is read and compared with its checksums first. ``done``
    is told about every layer that is on disk.
    """
    layers: list[LayerRecord] = []
    resumed = 0
    path = partial.path / DATA_NAME
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.write(header_page(index))
        file.truncate(index.nbytes)
        writer = AlignedWriter(file)
        for layer, (spec, record) in enumerate(zip(specs, index.layers, strict=True)):
            known = partial.checksums(record.module)
            if known is not None and _intact(file, record, index.format, known):
                resumed += 1
                advance(record.nbytes(index.format), record.module)
            else:
                try:
                    known = _write_layer(
                        writer, weights, spec, record, index.format, advance, importance
                    )
                except _NotWritableError as error:
                    check_finite(weights, specs, index, advance, (layer, error.expert))
                    raise CheckpointError(
                        f"expert {error.expert} of {record.module}: {error.message}",
                        hint=error.hint,
                    ) from error
                os.fsync(file.fileno())
                partial.layer_done(record.module, known)
            done(layer)
            layers.append(replace(record, checksums=tuple(known)))
    return replace(index, layers=tuple(layers)), resumed


class _NotWritableError(FormatError):
    """An expert's weights have values that its format does not take."""

    def __init__(self, expert: int, error: FormatError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.expert = expert


def check_finite(
    weights: Weights,
    specs: list[ExpertsSpec],
    index: StoreIndex,
    advance: Advance,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Read every expert from ``first`` (layer, expert) on, and refuse values that are not finite.

    Raises
    ------
    CheckpointError
        Naming all of them: layer, expert, matrix, and how many.
    """
    found = []
    for layer, (spec, record) in enumerate(zip(specs, index.layers, strict=True)):
        for expert in range(record.experts):
            if (layer, expert) < first:
                continue
            for name, count in _not_finite(weights, spec, expert).items():
                found.append(f"{record.module}, expert {expert}, {name} ({count})")
            advance(record.shape(index.format).stride, record.module)
    if found:
        raise CheckpointError(
            f"{len(found)} matrices of experts hold inf or NaN: {few(found, 100)}",
            hint="the checkpoint is damaged: download it again, or ask its publisher",
        )


def _not_finite(weights: Weights, spec: ExpertsSpec, expert: int) -> dict[str, int]:
    """Return how many values of one expert are not finite, by matrix, where any are."""
    sides = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    counts: Counter[str] = Counter()
    for pieces in weights.read_up(spec, expert):
        for name, piece in zip(sides, pieces, strict=True):
            counts[name] += _count(piece)
    for piece in weights.read_down(spec, expert):
        counts["down_proj"] += _count(piece)
    if spec.bias:
        up, down = weights.read_biases(spec, expert)
        for name, bias in zip((*sides, "down_proj"), (*up, down), strict=True):
            counts[f"{name}_bias"] += _count(bias)
    return dict(+counts)


def _count(rows: Rows) -> int:
    return int((~np.isfinite(values_of(rows))).sum())


def _intact(file: IO[bytes], record: LayerRecord, fmt: str, checksums: list[int]) -> bool:
    stride = record.shape(fmt).stride
    file.seek(record.offset)
    return len(checksums) == record.experts and all(
        zlib.crc32(file.read(stride)) == checksum for checksum in checksums
    )


def _write_layer(
    file: AlignedWriter,
    weights: Weights,
    spec: ExpertsSpec,
    record: LayerRecord,
    fmt: str,
    advance: Advance,
    importance: Importance | None,
) -> list[int]:
    shape = record.shape(fmt)
    file.seek(record.offset)
    checksums = []
    for expert in range(record.experts):
        block = _Block(file)
        try:
            _write_expert(block, weights, spec, shape, expert, importance)
        except FormatError as error:
            raise _NotWritableError(expert, error) from error
        block.pad_to(shape.stride)
        checksums.append(block.checksum)
        advance(shape.stride, record.module)
    file.flush()
    return checksums


def _write_expert(
    block: _Block,
    weights: Weights,
    spec: ExpertsSpec,
    shape: Block,
    expert: int,
    importance: Importance | None,
) -> None:
    """Write one expert as :func:`hybrid.formats.block.pack_expert` would, without holding it."""
    parts = ("gate", "up", "down") if spec.gated else ("up", "down")
    *above, below = (
        None if importance is None else importance.of_expert(spec, part, expert) for part in parts
    )
    for sides in weights.read_up(spec, expert):
        for chunk in _chunks(sides):
            strips = pad(len(chunk[0]), GROUP) // TILE
            ready = [
                packed(side, shape.format, GROUP, counts).reshape(strips, -1)
                for side, counts in zip(chunk, above, strict=True)
            ]
            block.write(_alternate(ready))
    block.pad_to(shape.down_offset)
    for down in weights.read_down(spec, expert):
        for (rows,) in _chunks([down]):
            block.write(packed(rows, shape.formats[1], importance=below))
    block.pad_to(shape.bias_offset)
    if spec.bias:
        sides, down_bias = weights.read_biases(spec, expert)
        block.write(_alternate([_whole_groups(floats(side)).reshape(-1, TILE) for side in sides]))
        block.write(floats(down_bias))
    block.pad_to(shape.block_bytes)


def _chunks(sides: Sequence[Rows]) -> Iterator[list[Rows]]:
    """Cut matrices into some rows (whole groups of them) at a time, to be packed."""
    rows, cols = sides[0].shape
    step = max(GROUP, _VALUES // cols // GROUP * GROUP)
    for start in range(0, rows, step):
        yield [side[start : start + step] for side in sides]


def _whole_groups(bias: F32) -> F32:
    """Append zeros up to a multiple of 32."""
    return np.pad(bias, (0, -len(bias) % GROUP))


def _alternate(sides: list[NDArray[Any]]) -> NDArray[Any]:
    """Interleave the strips of gate and up."""
    return np.ascontiguousarray(np.stack(sides, axis=1))


class _Block:
    """One expert's bytes on their way into the file: position and checksum."""

    def __init__(self, file: AlignedWriter) -> None:
        self._file = file
        self._written = 0
        self.checksum = 0

    def write(self, data: NDArray[Any]) -> None:
        self._file.write(data.data)
        self.checksum = zlib.crc32(data.data, self.checksum)
        self._written += data.nbytes

    def pad_to(self, n_bytes: int) -> None:
        if n_bytes > self._written:
            self.write(np.zeros(n_bytes - self._written, np.uint8))
