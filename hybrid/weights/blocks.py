"""Rows of a matrix on their way into a store: as torch has them, or as blocks of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid.formats.errors import FormatError
from hybrid.formats.matrix import from_gguf, pack
from hybrid.formats.strips import F32, U8
from hybrid.gguf.header import GgufTensor
from hybrid.gguf.tensors import widened


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows of a tensor of a GGUF file, ``[rows, bytes]``."""

    tensor: GgufTensor
    raw: U8

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> Blocks:
        return Blocks(self.tensor, self.raw[rows])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.raw), self.tensor.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes


Rows = Tensor | Blocks


def floats(rows: Rows) -> F32:
    """Return rows in float32.

    Raises
    ------
    FormatError
        When some value is not finite.
    """
    values = values_of(rows)
    if not np.isfinite(values).all():
        raise FormatError("the weights hold inf or NaN", hint="the checkpoint is damaged")
    return values


def values_of(rows: Rows) -> F32:
    """Return rows in float32, whatever they hold."""
    if isinstance(rows, Blocks):
        return widened(rows.tensor, rows.raw)
    values: F32 = rows.to(torch.float32).contiguous().numpy()
    return values


def packed(rows: Rows, fmt: str, multiple: int = 1) -> U8:
    """Lay rows out in strips of a format: blocks of it as they are, all else quantized anew.

    Parameters
    ----------
    multiple
        Rows of zeros are appended up to a multiple of this.
    """
    missing = -len(rows) % multiple
    if isinstance(rows, Blocks) and rows.tensor.type.name == fmt:
        return from_gguf(np.pad(rows.raw, ((0, missing), (0, 0))), fmt)
    return pack(np.pad(floats(rows), ((0, missing), (0, 0))), fmt)
