"""Reads a directory with quantized matrices as if these were ordinary tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.ask.published import Convention
from hybrid.weights.blocks import Coded
from hybrid.weights.published import matrices
from hybrid.weights.published_matrix import Matrix
from hybrid.weights.source_files import TensorInfo
from hybrid.weights.tally import Tally
from hybrid.weights.tensor_files import TensorReader

#: Tensors of one name that are kept, where they are small: those of gate and of up, in turns.
_KEPT, _SMALL_BYTES = 2, 32 << 20


@dataclass(frozen=True)
class MatrixInfo:
    """What is known of a quantized matrix before it is read; ``dtype`` is the model's."""

    key: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Arrays:
    """Tensors of files as numpy has them: floats of less than 32 bits are widened."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._kept: dict[str, OrderedDict[str, NDArray[Any]]] = {}

    def rows(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` of a tensor."""
        return _array(self._reader.read(info.key, start, stop), scale=info.key.endswith("_scale"))

    def whole(self, info: TensorInfo) -> NDArray[Any]:
        """All of a tensor; the last ones are kept."""
        name = info.key.rpartition(".")[2]
        kept = self._kept.setdefault(name, OrderedDict())
        if info.key not in kept:
            while len(kept) >= (_KEPT if info.nbytes <= _SMALL_BYTES else 1):
                kept.popitem(last=False)
            kept[info.key] = _array(self._reader.read(info.key))
        return kept[info.key]


def _array(tensor: Tensor, *, scale: bool = False) -> NDArray[Any]:
    if scale and tensor.dtype.itemsize == 1:  # of floats of 4 bits: bytes of scales
        return tensor.view(torch.uint8).numpy()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class PublishedReader:
    """The tensors of a checkpoint directory, quantized matrices as the model has them.

    Parameters
    ----------
    reader
        The files as they are.
    convention
        What their settings say.
    dtype
        The model's, which its matrices are said to have.
    coded
        Whether quantized matrices are looked for: not where transformers dequantizes them.

    Attributes
    ----------
    tensors
        What is known of each: no part of a quantized matrix, but the matrix.
    matrices
        The quantized ones.
    tally
        What becomes of them.

    Raises
    ------
    CheckpointError
        When the parts of a matrix do not fit together.
    """

    def __init__(
        self, reader: TensorReader, convention: Convention, dtype: torch.dtype, *, coded: bool
    ) -> None:
        self._reader = reader
        self._files = Arrays(reader)
        found = matrices(reader.tensors, self._files, convention) if coded else {}
        self.matrices: dict[str, Matrix] = found
        self.tally = Tally()
        self.tensors: Mapping[str, Any] = reader.tensors
        if self.matrices:
            self.tensors = _seen(reader.tensors, self.matrices.values(), dtype)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        self._reader.close()

    def format(self, key: str) -> str | None:
        """Return the format of ours for a quantized matrix; None for any other tensor."""
        matrix = self.matrices.get(key)
        return None if matrix is None else matrix.format(self._files)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``start:stop`` of a tensor's first dimension (all by default)."""
        matrix = self.matrices.get(key)
        if matrix is None:
            return self._reader.read(key, start, stop)
        stop = matrix.shape[0] if stop is None else stop
        return torch.from_numpy(np.ascontiguousarray(matrix.floats(self._files, start, stop)))

    def read_matrix_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of a tensor seen as a matrix of its last dimension."""
        if key in self.matrices:
            return self.read(key, start, stop)
        return self._reader.read_matrix_rows(key, start, stop)

    def coded(self, key: str) -> bool:
        """Whether a tensor can be read as elements."""
        matrix = self.matrices.get(key)
        return matrix is not None and matrix.coded

    def read_elements(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a matrix as elements, each an int64 to torch."""
        matrix = self.matrices[key]
        stop = matrix.shape[0] if stop is None else stop
        return torch.from_numpy(matrix.read(self._files, start, stop).view(np.int64))

    def read_blocks(self, key: str, start: int, stop: int) -> Coded | None:
        """Return the same as elements; None where they are none."""
        if not self.coded(key):
            return None
        return Coded.of(self.read_elements(key, start, stop), self.tally)


def _seen(
    tensors: Mapping[str, TensorInfo], found: Iterable[Matrix], dtype: torch.dtype
) -> dict[str, Any]:
    """Return tensors with quantized matrices in the place of their parts."""
    seen: dict[str, Any] = dict(tensors)
    for matrix in found:
        for info in matrix.parts.values():
            seen.pop(info.key, None)
    for matrix in found:
        path = next(iter(matrix.parts.values())).path
        seen[matrix.key] = MatrixInfo(matrix.key, path, dtype, matrix.shape, matrix.nbytes)
    return seen
