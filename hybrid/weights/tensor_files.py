"""Reads and writes safetensors files piece by piece.

The reader never maps a file: it reads the asked bytes and nothing else, so a conversion holds
one piece of one tensor at a time. Every header is checked before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from hybrid.errors import CheckpointError
from hybrid.weights.source_files import (
    AGAIN,
    DTYPES,
    TensorInfo,
    unreadable,
)

SHARD_BYTES = 4 << 30
_NAMES = {getattr(torch, name): stored for stored, (name, _) in DTYPES.items()}


class TensorReader:
    """The tensors of a checkpoint directory, by key.

    Parameters
    ----------
    tensors
        What the headers of its files say.
    place
        Where each can be read, asked every time; by default where the headers were.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        place: Callable[[TensorInfo], Path] = lambda info: info.path,
    ) -> None:
        self.tensors = tensors
        self._place = place
        self._open: dict[Path, IO[bytes]] = {}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read ``start:stop`` of a tensor's first dimension (all by default), as a copy."""
        info = self.tensors[key]
        if not info.shape:
            return self._read(info, 0, ())
        stop = info.shape[0] if stop is None else stop
        return self._read(info, start * info.row_bytes, (stop - start, *info.shape[1:]))

    def read_matrix_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start:stop`` of a tensor seen as a matrix of its last dimension."""
        info = self.tensors[key]
        cols = info.shape[-1]
        return self._read(info, start * cols * info.dtype.itemsize, (stop - start, cols))

    def read_blocks(self, key: str, start: int, stop: int) -> None:
        """Return nothing: safetensors hold values, not blocks of them."""

    def _read(self, info: TensorInfo, at: int, shape: tuple[int, ...]) -> torch.Tensor:
        if 0 in shape:
            return torch.empty(shape, dtype=info.dtype)
        path = self._place(info)
        data = bytearray(info.dtype.itemsize * int(torch.Size(shape).numel()))
        try:
            if path not in self._open:
                self._open[path] = path.open("rb", buffering=0)
            file = self._open[path]
            file.seek(info.offset + at)
            got = read_into(file, data)
        except OSError as error:
            raise unreadable(path, error) from error
        if got != len(data):
            raise CheckpointError(
                f"{path} is cut short: {len(data)} bytes of {info.key} are wanted, {got} are there",
                hint=AGAIN,
            )
        return torch.frombuffer(data, dtype=info.dtype).reshape(shape)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_into(file: IO[bytes], data: bytearray) -> int:
    """Fill ``data`` from an unbuffered file (one read may return less); return the bytes got."""
    view, got = memoryview(data), 0
    while got < len(data):
        n = file.readinto(view[got:])  # type: ignore[attr-defined]
        if not n:
            break
        got += n
    return got


def check_digests(files: Iterable[Path]) -> None:
    """Compare files with the SHA-256 that the Hugging Face cache keeps of them, if it does.

    Raises
    ------
    CheckpointError
        Naming the damaged file.
    """
    for path in files:
        expected = _known_digest(path)
        if expected is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {found}, it was published as {expected}",
                hint=AGAIN,
            )


def _known_digest(path: Path) -> str | None:
    """In the hub cache a file's blob is named by it; ``--local-dir`` keeps it in a side file."""
    note = path.parent / ".cache/huggingface/download" / f"{path.name}.metadata"
    lines = note.read_text().splitlines() if note.is_file() else []
    known = lines[1] if len(lines) > 1 else path.resolve().name
    return known if re.fullmatch("[0-9a-f]{64}", known) else None


@dataclass(frozen=True)
class TensorPlan:
    """A tensor about to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def plan_shards(tensors: Iterable[TensorPlan]) -> list[list[TensorPlan]]:
    """Split tensors into files of at most :data:`SHARD_BYTES`, in order."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def shard_header(shard: Iterable[TensorPlan]) -> bytes:
    """Return the bytes that go before the tensors' data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def shard_names(count: int) -> Iterator[str]:
    """Yield the file names transformers looks for."""
    if count == 1:
        yield "model.safetensors"
        return
    for n in range(1, count + 1):
        yield f"model-{n:05d}-of-{count:05d}.safetensors"


def shard_index(shards: Mapping[str, Iterable[TensorPlan]]) -> dict[str, Any]:
    """Return the content of :data:`INDEX_NAME` for several shards."""
    weight_map = {tensor.key: name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
