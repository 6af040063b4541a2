"""A quantized matrix of a checkpoint directory, whoever made it: one for the model, several tensors
in the files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import CheckpointError
from hybrid.formats.elements import numbers_of
from hybrid.formats.strips import F32, U8
from hybrid.weights.source_files import TensorInfo

CHECK = "the files are not what their settings say: compare with the publisher's own"

Numbers = NDArray[Any]
Parts = Mapping[str, TensorInfo]


class Files(Protocol):
    """Reads tensors, as numpy has them: floats of 16 and 8 bits are widened or bytes."""

    def rows(self, info: TensorInfo, start: int, stop: int) -> Numbers:
        """Rows ``start:stop`` of a tensor."""

    def whole(self, info: TensorInfo) -> Numbers:
        """All of a tensor; the last ones are kept."""


class Matrix(ABC):
    """A quantized matrix ``[rows, cols]``.

    Parameters
    ----------
    path
        Of its module.
    parts
        Its tensors, by what their names have behind the module's.
    """

    #: Whether it is read as elements.
    coded = True

    def __init__(self, path: str, parts: Parts) -> None:
        self.path, self.parts = path, parts
        self.key = f"{path}.weight"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @abstractmethod
    def format(self, files: Files) -> str | None:
        """The format of ours that is nearest; None of floats."""

    @abstractmethod
    def read(self, files: Files, start: int, stop: int) -> Any:
        """Rows ``start:stop``, as elements or in float32."""

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(info.nbytes for info in self.parts.values())

    def floats(self, files: Files, start: int, stop: int) -> F32:
        """Rows ``start:stop`` in float32."""
        found: F32 = self.read(files, start, stop)
        return numbers_of(found) if self.coded else found

    def wrong(self, what: str) -> CheckpointError:
        """Return the error for tensors that make no such matrix."""
        sizes = ", ".join(f"{name} {list(info.shape)}" for name, info in self.parts.items())
        return CheckpointError(f"{self.path}: {what} ({sizes})", hint=CHECK)


def nibbles(raw: U8) -> U8:
    """Codes of 4 bits ``[n, 2 * bytes]``, the low ones first."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
