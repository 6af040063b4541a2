"""Rows of a matrix on their way into a store: as torch has them, as blocks of a GGUF file, or as
elements of a checkpoint that somebody quantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid.formats.elements import ELEMENT, Elements, numbers_of
from hybrid.formats.errors import FormatError
from hybrid.formats.matrix import from_elements, from_gguf, pack, unpack
from hybrid.formats.strips import F32, U8
from hybrid.gguf.header import GgufTensor
from hybrid.gguf.tensors import widened
from hybrid.weights.tally import Tally


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows of a tensor of a GGUF file, ``[rows, bytes]``, and who counts what becomes of them."""

    tensor: GgufTensor
    raw: U8
    tally: Tally

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> Blocks:
        return Blocks(self.tensor, self.raw[rows], self.tally)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.raw), self.tensor.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes


@dataclass(frozen=True, eq=False)
class Coded:
    """Rows of elements (:mod:`hybrid.formats.elements`), and who counts what becomes of them."""

    elements: Elements
    tally: Tally

    @classmethod
    def of(cls, rows: Tensor, tally: Tally) -> Coded:
        """Return what torch has as rows of int64."""
        return cls(rows.contiguous().numpy().view(ELEMENT), tally)

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, rows: slice) -> Coded:
        return Coded(self.elements[rows], self.tally)

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.elements.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        return self.elements.nbytes


Rows = Tensor | Blocks | Coded


def floats(rows: Rows) -> F32:
    """Return rows in float32.

    Raises
    ------
    FormatError
        When some value is not finite.
    """
    values = values_of(rows)
    if not np.isfinite(values).all():
        raise _not_finite()
    return values


def _not_finite() -> FormatError:
    return FormatError("the weights hold inf or NaN", hint="the checkpoint is damaged")


def values_of(rows: Rows) -> F32:
    """Return rows in float32, whatever they hold."""
    if isinstance(rows, Blocks):
        return widened(rows.tensor, rows.raw)
    if isinstance(rows, Coded):
        return numbers_of(rows.elements)
    values: F32 = rows.to(torch.float32).contiguous().numpy()
    return values


def packed(rows: Rows, fmt: str, multiple: int = 1, importance: F32 | None = None) -> U8:
    """Lay rows out in strips of a format: blocks and elements of it as they are, all else anew.

    Parameters
    ----------
    multiple
        Rows of zeros are appended up to a multiple of this.
    importance
        What an error of each input counts for, where something is quantized anew.
    """
    missing = -len(rows) % multiple
    if isinstance(rows, Blocks) and rows.tensor.type.name == fmt:
        rows.tally.keep(fmt, rows.shape[0] * rows.shape[1])
        return from_gguf(np.pad(rows.raw, ((0, missing), (0, 0))), fmt)
    if isinstance(rows, Tensor):
        return pack(np.pad(floats(rows), ((0, missing), (0, 0))), fmt, None, importance)
    if isinstance(rows, Blocks):
        values, held = floats(rows), None
    else:
        held = _elements(rows, fmt, len(rows) + missing)
        if held is not None and held[1]:
            rows.tally.keep(fmt, rows.elements.size)
            return held[0]
        values = floats(rows)
    if held is None:
        found = pack(np.pad(values, ((0, missing), (0, 0))), fmt, None, importance)
    else:
        found = held[0]
    if fmt in rows.tally.watched:
        are = unpack(found, len(rows) + missing, rows.shape[1], fmt)[: len(rows)]
        rows.tally.change(fmt, values, are)
    return found


def _elements(rows: Coded, fmt: str, count: int) -> tuple[U8, bool] | None:
    """Return elements in strips of a format, and whether exactly; None where it holds none."""
    if not np.isfinite(rows.elements["scale"]).all():
        raise _not_finite()
    return from_elements(rows.elements, fmt, count)
