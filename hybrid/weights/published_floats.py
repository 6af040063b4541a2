"""Quantized matrices of floats of 4 and 8 bits, and of bitsandbytes' table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid.ask.published import SMALLER, Convention
from hybrid.formats.elements import MXFP4, NORMAL, NVFP4, Elements, elements
from hybrid.formats.strips import F32
from hybrid.weights.published_matrix import Files, Matrix, Parts, nibbles


class Floats4(Matrix):
    """Floats of 4 bits: NVFP4 of ModelOpt and compressed-tensors, and the latter's MXFP4."""

    def __init__(self, path: str, parts: Parts) -> None:
        super().__init__(path, parts)
        self._codes = parts.get("weight_packed") or parts["weight"]
        self._kind = MXFP4 if parts["weight_scale"].stored in ("U8", "F8_E8M0") else NVFP4
        rows, cols = self.shape
        if parts["weight_scale"].shape != (rows, cols // self._size) or cols % self._size:
            raise self.wrong(f"floats of 4 bits have a scale for every {self._size}")

    @property
    def _size(self) -> int:
        return 32 if self._kind == MXFP4 else 16

    @property
    def shape(self) -> tuple[int, int]:
        rows, halves = self._codes.shape
        return rows, 2 * halves

    def format(self, files: Files) -> str | None:
        return "mxfp4" if self._kind == MXFP4 else "nvfp4"

    def read(self, files: Files, start: int, stop: int) -> Elements:
        codes = nibbles(files.rows(self._codes, start, stop).view(np.uint8))
        found = elements(codes.shape, self._kind)
        found["number"] = codes
        scales = files.rows(self.parts["weight_scale"], start, stop).view(np.uint8)
        found.reshape(len(codes), -1, self._size)["sub"] = scales[..., None]
        found["scale"] = self._factor(files)
        return found

    def _factor(self, files: Files) -> np.float32:
        if (info := self.parts.get("weight_scale_2")) is not None:
            return np.float32(files.whole(info).reshape(-1)[0])
        if (info := self.parts.get("weight_global_scale")) is not None:
            return np.float32(1) / np.float32(files.whole(info).reshape(-1)[0])
        return np.float32(1)


class Floats8(Matrix):
    """Floats of 8 bits with a scale of the matrix, of the row or of a block."""

    coded = False

    def __init__(self, path: str, parts: Parts, convention: Convention) -> None:
        super().__init__(path, parts)
        self._convention = convention

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.parts["weight"].shape
        return rows, cols

    def format(self, files: Files) -> str | None:
        return None

    def read(self, files: Files, start: int, stop: int) -> F32:
        values: F32 = files.rows(self.parts["weight"], start, stop)
        scales = files.whole(self.parts["weight_scale"])
        sizes = [size for size in scales.shape if size != 1]
        rows, cols = self.shape
        if not sizes:
            return values * scales.reshape(())
        if sizes == [rows] and (scales.ndim < 2 or scales.shape[0] == rows):
            return values * scales.reshape(-1, 1)[start:stop]
        grid = scales.reshape(scales.shape[0], -1) if scales.ndim < 3 else scales.squeeze()
        grid = grid.reshape(grid.shape[0], -1)
        stated = self._convention.blocks or (128, 128)
        high, wide = (
            block if -(-size // block) == count else -(-size // count)
            for size, count, block in zip((rows, cols), grid.shape, stated, strict=True)
        )
        down, across = np.arange(start, stop) // high, np.arange(cols) // wide
        return values * grid[down][:, across]


class Normal(Matrix):
    """bitsandbytes' nf4: codes of the whole matrix in one run, in blocks with a largest value."""

    def __init__(
        self, path: str, parts: Parts, shape: tuple[int, int], state: Mapping[str, Any]
    ) -> None:
        super().__init__(path, parts)
        self._shape, self._state = shape, state
        self._block = int(state.get("blocksize") or 64)
        rows, cols = shape
        if parts["weight"].nbytes * 2 != rows * cols:
            raise self.wrong(f"codes of 4 bits do not make {list(shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def format(self, files: Files) -> str | None:
        return "nf4" if self._block == 64 and self._shape[1] % 64 == 0 else SMALLER

    def read(self, files: Files, start: int, stop: int) -> Elements:
        cols = self._shape[1]
        first, last = start * cols, stop * cols
        raw = files.whole(self.parts["weight"]).reshape(-1)[first // 2 : -(-last // 2)]
        codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        found = elements((stop - start, cols), NORMAL)
        found["number"] = codes.reshape(found.shape)
        of_blocks = self._largest(files)
        found["scale"] = of_blocks[np.arange(first, last) // self._block].reshape(found.shape)
        return found

    def _largest(self, files: Files) -> F32:
        """The largest values of the blocks, which may be quantized themselves."""
        kept = files.whole(self.parts["weight.absmax"]).reshape(-1)
        nested = self.parts.get("weight.nested_absmax")
        if nested is None:
            return kept.astype(np.float32)
        table = files.whole(self.parts["weight.nested_quant_map"]).reshape(-1)
        outer = files.whole(nested).reshape(-1)
        size = int(self._state.get("nested_blocksize") or 256)
        scales = np.repeat(outer, size)[: len(kept)]
        found: F32 = table[kept] * scales + np.float32(self._state.get("nested_offset") or 0)
        return found
