"""Writes what is not an expert: dense weights as they are, dequantized, cast or quantized."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hybrid.errors import CheckpointError
from hybrid.formats.matrix import packed_bytes
from hybrid.formats.registry import format_of, packs_dense
from hybrid.formats.strips import GROUP
from hybrid.weights.blocks import Rows, packed
from hybrid.weights.expert_writer import Advance
from hybrid.weights.importance import Importance
from hybrid.weights.partial import Partial, sync
from hybrid.weights.source_files import INDEX_NAME
from hybrid.weights.source_formats import BlockDequantize, is_scale, scale_pattern
from hybrid.weights.tensor_files import (
    TensorPlan,
    plan_shards,
    shard_header,
    shard_index,
    shard_names,
)
from hybrid.weights.weight_map import Target, Weights

#: Bytes of float32 that are handled at a time, about: few enough to stay in the cache.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Output:
    """A tensor of the converted directory and how its rows come about."""

    plan: TensorPlan
    pieces: Callable[[], Iterator[Tensor]]


class DensePlan:
    """Everything that goes into the safetensors files of a converted directory.

    Tensors keep the checkpoint's names, so that loading maps them as it always does; a
    quantized matrix is stored by its module's path as ``<path>.packed``.

    Parameters
    ----------
    weights
        The mapping from the checkpoint.
    matrices
        The modules whose matrix has a format: path to ``[rows, cols]``.
    formats
        Theirs, each one of :func:`~hybrid.formats.registry.dense_formats`.
    importance
        What errors of their inputs count for, where that is known.
    """

    def __init__(
        self,
        weights: Weights,
        matrices: Mapping[str, tuple[int, int]],
        formats: Mapping[str, str],
        importance: Importance | None = None,
    ) -> None:
        self._importance = importance
        self._weights = weights
        self._matrices = matrices
        outputs: list[_Output] = []
        for target in weights.dense.values():
            paths = [_path(name) for name in target.makes]
            fmt = next((formats[path] for path in paths if path in formats), None)
            if fmt is None:
                outputs += self._sources(target, None)
            elif packs_dense(fmt):
                outputs += (self._made(target, name, formats) for name in target.makes)
            else:
                outputs += self._sources(target, getattr(torch, format_of(fmt).tensor))
        plans = plan_shards([output.plan for output in outputs])
        self._shards = dict(zip(shard_names(len(plans)), plans, strict=True))
        self._outputs = {output.plan.key: output for output in outputs}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(output.plan.nbytes for output in self._outputs.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the files, their headers included."""
        return self.nbytes + sum(len(shard_header(shard)) for shard in self._shards.values())

    def write(self, folder: Partial, advance: Advance) -> None:
        """Write the files that an interrupted run did not complete."""
        for name, shard in self._shards.items():
            path = folder.path / name
            if path.exists():
                advance(sum(plan.nbytes for plan in shard), name)
                continue
            unfinished = path.with_suffix(".tmp")
            with unfinished.open("wb") as file:
                file.write(shard_header(shard))
                for plan in shard:
                    for piece in self._outputs[plan.key].pieces():
                        data = piece.contiguous().view(-1).view(torch.uint8).numpy()
                        file.write(data.data)
                        advance(data.nbytes, plan.key)
            sync(unfinished)
            os.replace(unfinished, path)
        if len(self._shards) > 1:
            index = json.dumps(shard_index(self._shards), indent=1)
            (folder.path / INDEX_NAME).write_text(index + "\n")

    def check(self, advance: Advance) -> None:
        """Make everything, as :meth:`write` would, and write nothing.

        Raises
        ------
        CheckpointError
            Naming all tensors that hold NaN.
        """
        damaged = []
        for key, output in self._outputs.items():
            try:
                for piece in output.pieces():
                    advance(piece.nbytes, key)
            except CheckpointError as error:
                damaged.append(error)
        if damaged:
            raise CheckpointError(
                "; ".join(error.message for error in damaged), hint=damaged[0].hint
            )

    def _sources(self, target: Target, cast: torch.dtype | None) -> Iterator[_Output]:
        """Yield a target's source tensors, dequantized where they have scales."""
        for pattern, keys in target.sources.items():
            if is_scale(pattern):
                continue
            for key, scale in zip(keys, _scales(target, pattern), strict=True):
                info = self._weights.reader.tensors[key]
                dtype = info.dtype if scale is None else target.makes[target.name].dtype
                dtype = cast if cast is not None and dtype.is_floating_point else dtype
                packed_fp4 = scale is not None and info.dtype == torch.int8
                shape = (*info.shape[:-1], 2 * info.shape[-1]) if packed_fp4 else info.shape
                rows = partial(self._rows, target, key, scale, dtype)
                yield _Output(TensorPlan(key, dtype, shape), rows)

    def _made(self, target: Target, name: str, formats: Mapping[str, str]) -> _Output:
        """One of the model tensors that a target makes, quantized if it is to be."""
        path, made = _path(name), target.makes[name]
        if path not in formats:
            plan = TensorPlan(name, made.dtype, tuple(made.shape))
            return _Output(plan, partial(self._made_rows, target, name))
        (height, cols), fmt = self._matrices[path], formats[path]
        step = max(GROUP, _CHUNK_BYTES // (cols * 4) // GROUP * GROUP)

        known = self._importance
        counts = None if known is None else known.of_matrix(path, cols)

        def pieces() -> Iterator[Tensor]:
            for rows in self._blocks(target, height, step) or self._made_or_coded(target, name):
                for start in range(0, len(rows), step):
                    piece = packed(rows[start : start + step], fmt, importance=counts)
                    yield torch.from_numpy(piece)

        size = packed_bytes(height, cols, fmt)

        return _Output(TensorPlan(f"{path}.packed", torch.uint8, (size,)), pieces)

    def _blocks(self, target: Target, rows: int, step: int) -> Iterator[Rows] | None:
        """Yield a matrix as its checkpoint has it packed, in pieces; None where it has not."""
        reader, (key, *others) = self._weights.reader, target.keys
        if others or target.operations or reader.read_blocks(key, 0, 1) is None:
            return None
        pieces = (reader.read_blocks(key, at, min(rows, at + step)) for at in range(0, rows, step))
        return (piece for piece in pieces if piece is not None)

    def _made_or_coded(self, target: Target, name: str) -> Iterator[Rows]:
        """Yield a model tensor as elements, all at once, where its sources are; else in pieces."""
        coded = self._weights.read_coded(target, name)
        if coded is None:
            yield from self._made_rows(target, name)
        else:
            yield coded

    def _made_rows(self, target: Target, name: str) -> Iterator[Tensor]:
        """Yield a model tensor in pieces: of whole groups of rows, or all of it at once.

        Only a converter that does more than dequantize needs its sources whole.
        """
        patterns = [pattern for pattern in target.sources if not is_scale(pattern)]
        if len(patterns) == 1 and all(isinstance(op, BlockDequantize) for op in target.operations):
            (key,), (scale,) = target.sources[patterns[0]], _scales(target, patterns[0])
            yield from self._rows(target, key, scale, target.makes[name].dtype)
        else:
            yield _checked(name, self._weights.read_dense(target)[name])

    def _rows(
        self, target: Target, key: str, scale: str | None, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield a source tensor in pieces of whole groups of rows, dequantized if it has scales."""
        reader = self._weights.reader
        shape = reader.tensors[key].shape
        if len(shape) < 2:
            yield _checked(key, reader.read(key)).to(dtype)
            return
        rows, cols = int(torch.Size(shape[:-1]).numel()), shape[-1]
        grid = None if scale is None else reader.read(scale)
        per_scale = 1
        if grid is not None:
            dequantize: BlockDequantize = target.operations[0]
            per_scale = dequantize.rows_per_scale(rows, grid.shape[0]) if grid.ndim == 2 else rows
        unit = math.lcm(GROUP, per_scale)
        step = max(1, _CHUNK_BYTES // (cols * 4) // unit) * unit
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            piece = reader.read_matrix_rows(key, start, stop)
            if grid is not None:
                part = grid[start // per_scale : -(-stop // per_scale)] if grid.ndim == 2 else grid
                piece = dequantize.dequantize(piece, part, dtype)
            yield _checked(key, piece).to(dtype)


def _path(name: str) -> str:
    """The module whose weight ``name`` is; a name that no module has for other tensors."""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _scales(target: Target, pattern: str) -> list[str | None]:
    """The keys of the scales that go with the keys of ``pattern``."""
    scales = scale_pattern(pattern, target.sources)
    if scales is None:
        return [None] * len(target.sources[pattern])
    return [*target.sources[scales]]


def _checked(key: str, values: Tensor) -> Tensor:
    if values.is_floating_point() and values.float().isnan().any():
        raise CheckpointError(f"{key} holds NaN", hint="the checkpoint is damaged")
    return values
