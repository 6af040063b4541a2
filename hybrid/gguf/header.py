"""Reads the headers of GGUF files: metadata, and where each tensor lies.

The format is little-endian: a magic, a version, counts, keys with typed values, descriptions of
tensors, padding, data. A model may be split into files that each describe their own tensors.
Nothing is believed that does not fit the file's size.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.gguf.types import TYPES, BlockType

MAGIC = b"GGUF"
ENDING = ".gguf"
_VERSIONS = (2, 3)
_AGAIN = "download the file again, or copy it again from where it came"
_ALIGNMENT = 32
#: A header is read whole, in steps of this size until nothing is missing of it.
_FIRST_BYTES = 1 << 22
#: More dimensions than ggml has, and longer names than it takes, are damage.
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16

#: Values of metadata by the number of their type; 8 is text, 9 an array.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_FLOAT, _TEXT, _ARRAY = 6, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes
    ----------
    shape
        Slowest dimension first, as torch has it; the file has them in the other order.
    path, offset
        Its file, and its first byte there.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def key(self) -> str:
        """Its name, as tensors of other files call that."""
        return self.name

    @property
    def rows(self) -> int:
        """Rows of the matrix that it is, all dimensions but the last taken together."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.values * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What all files of a model say together.

    Attributes
    ----------
    path
        The file that was named; of a split model the first.
    metadata
        Keys and values of the first file.
    tensors
        Of all files, by name.
    files
        All files, in order.
    header_bytes
        Where the data begins in each of ``files``.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    files: tuple[Path, ...]
    header_bytes: tuple[int, ...]

    @property
    def architecture(self) -> str:
        """What it calls its architecture; empty if nothing."""
        return str(self.metadata.get("general.architecture") or "")

    @property
    def name(self) -> str:
        """What the model is called: its file, without the number of a part."""
        return re.sub(r"-\d{5}-of-\d{5}$", "", self.path.stem)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the architecture's own, without its name before the key."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def read_floats(self, name: str) -> NDArray[np.float32]:
        """Read a small tensor of float32 values.

        Raises
        ------
        CheckpointError
            When it is of another type.
        """
        tensor = self.tensors[name]
        if tensor.type.name != "f32":
            raise CheckpointError(
                f"{tensor.path}: {name} is {tensor.type.name}, it is always f32", hint=_AGAIN
            )
        return np.fromfile(
            tensor.path, np.dtype("<f4"), math.prod(tensor.shape), offset=tensor.offset
        ).reshape(tensor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ENDING:
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def models_in(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, of a split model the first, without projectors."""
    found = sorted(path for path in folder.glob(f"*{ENDING}") if "mmproj" not in path.name.lower())
    return [path for path in found if "-of-" not in path.name or "-00001-of-" in path.name]


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the headers of a model's files, of which one is named.

    Raises
    ------
    CheckpointError
        When a file is missing, damaged or cut short.
    UnsupportedModelError
        When it is big-endian, of an unknown version, or holds a type of tensor that is unknown.
    """
    one = _read_file(path)
    count = int(one.metadata.get("split.count") or 1)
    if count <= 1:
        return one
    return joined([one if part == path else _read_file(part) for part in _parts(path, count)])


def read_head(path: Path, size: int, fetch: Callable[[int], bytes]) -> GgufHeader:
    """Read the header of a file that lies elsewhere.

    Parameters
    ----------
    path
        What it is called.
    size
        Its bytes.
    fetch
        Returns so many of its first bytes, or all if there are fewer.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        As :func:`read_gguf`.
    """
    return _grown(path, size, fetch)


def joined(parts: list[GgufHeader]) -> GgufHeader:
    """Return what the headers of all files of a split model say together.

    Raises
    ------
    CheckpointError
        When they are not of one model.
    """
    path, count = parts[0].path, len(parts)
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        if part.metadata.get("split.count") != count:
            raise CheckpointError(
                f"{part.path} is no part of {path}: it is one of "
                f"{part.metadata.get('split.count', 1)} files, that of {count}",
                hint=_AGAIN,
            )
        tensors |= part.tensors
    told = parts[0].metadata.get("split.tensors.count", len(tensors))
    if told != len(tensors):
        raise CheckpointError(
            f"{parts[0].path} says that {told} tensors are in its {count} files, "
            f"{len(tensors)} are",
            hint=_AGAIN,
        )
    return GgufHeader(
        path=parts[0].path,
        metadata=parts[0].metadata,
        tensors=tensors,
        files=tuple(part.path for part in parts),
        header_bytes=tuple(part.header_bytes[0] for part in parts),
    )


def part_names(name: str, count: int) -> list[str]:
    """Return the names of all files of a split model, one of which is ``name``; else none."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", name)
    if found is None or int(found[2]) != count:
        return []
    return [f"{found[1]}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]


def _parts(path: Path, count: int) -> list[Path]:
    """Return all files of a split model, which must be there."""
    names = part_names(path.name, count)
    if not names:
        raise CheckpointError(
            f"{path} is one of {count} files of a model, and is not called so",
            hint=f"call the files NAME-00001-of-{count:05d}.gguf and so on, as llama.cpp does",
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{path.parent} has {count - len(missing)} of the {count} files of a split model; "
            f"missing: {listed}",
            hint="download the others into the same folder",
        )
    return [path.parent / name for name in names]


class _CutShortError(Exception):
    """More bytes are wanted than were read."""


class _Bytes:
    """The beginning of a file, taken apart value by value."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise _CutShortError
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        layout = struct.Struct(f"<{kind}")
        return layout.unpack(self.take(layout.size))[0]

    def text(self, longest: int | None = None) -> str:
        size = self.number("Q")
        if longest is not None and size > longest:
            raise ValueError(f"a name of {size} bytes")
        return self.take(size).decode("utf-8", "surrogateescape" if longest is None else "strict")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _FLOAT:
            return _shortest(self.number("f"))
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in (_TEXT, _ARRAY):
            if count > len(self._data):
                raise _CutShortError
            return [self.value(kind) for _ in range(count)]
        data = np.frombuffer(
            self.take(count * struct.calcsize(f"<{_NUMBERS[kind]}")), f"<{_NUMBERS[kind]}"
        )
        return data.tolist()


def _shortest(value: float) -> float:
    """Return the decimal number that a float32 was written for: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def _read_file(path: Path) -> GgufHeader:
    """Read one file's header."""
    try:
        with path.open("rb") as file:

            def fetch(size: int) -> bytes:
                file.seek(0)
                return file.read(size)

            return _grown(path, os.fstat(file.fileno()).st_size, fetch)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check that it exists and that you may read it",
        ) from error


def _grown(path: Path, size: int, fetch: Callable[[int], bytes]) -> GgufHeader:
    """Read more and more of a file, until its header is whole."""
    data = fetch(_FIRST_BYTES)
    _check_beginning(path, data, size)
    while True:
        try:
            return _parse(path, data, size)
        except _CutShortError:
            if len(data) >= size:
                raise CheckpointError(
                    f"{path} is cut short: it ends in its header, after {size} bytes", hint=_AGAIN
                ) from None
            data = fetch(4 * len(data))
        except (ValueError, KeyError, struct.error, MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"{path} has a damaged GGUF header ({type(error).__name__}: {error})", hint=_AGAIN
            ) from error


def _check_beginning(path: Path, data: bytes, size: int) -> None:
    """Refuse what is no GGUF file of a version and byte order that is read."""
    if data.startswith(b"version "):
        raise CheckpointError(
            f"{path} is a Git LFS pointer to weights, not the weights",
            hint="fetch them with 'git lfs pull', or with 'hf download'",
        )
    if data[:4] == MAGIC and size < 24:
        raise CheckpointError(
            f"{path} is cut short: it ends in its header, after {size} bytes", hint=_AGAIN
        )
    if data[:4] != MAGIC:
        raise CheckpointError(
            f"{path} is no GGUF file: it has {size} bytes and begins with {data[:4]!r}, "
            f"not {MAGIC!r}",
            hint=_AGAIN,
        )
    little, big = (struct.unpack(f"{order}I", data[4:8])[0] for order in "<>")
    if little not in _VERSIONS and big in _VERSIONS:
        raise UnsupportedModelError(
            f"{path} is big-endian, for other processors than this one",
            hint="convert it with llama.cpp's gguf_convert_endian.py, or download the usual file",
        )
    if little not in _VERSIONS:
        raise UnsupportedModelError(
            f"{path} is GGUF of version {little}, versions 2 and 3 are read",
            hint="make it anew with a newer llama.cpp, or upgrade hybrid-moe",
        )


def _parse(path: Path, data: bytes, size: int) -> GgufHeader:
    source = _Bytes(data)
    source.take(8)
    n_tensors, n_values = source.number("Q"), source.number("Q")
    if max(n_tensors, n_values) > size:
        raise ValueError(f"{n_tensors} tensors and {n_values} values in {size} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = source.text(_LONGEST_NAME)
        metadata[key] = source.value(source.number("I"))
    described = [_tensor(path, source) for _ in range(n_tensors)]
    alignment = int(metadata.get("general.alignment") or _ALIGNMENT)
    start = -(-source.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in described:
        if kind not in TYPES:
            raise UnsupportedModelError(
                f"{path} holds {name} in a type of number {kind}, which is unknown",
                hint=f"read are: {', '.join(known.name for known in TYPES.values())}",
            )
        tensor = GgufTensor(name, TYPES[kind], shape, path, start + offset)
        if name in tensors or shape[-1] % tensor.type.values:
            raise ValueError(f"{name} {list(shape)}, {tensor.type.name}")
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{path} is cut short: {name} lies at bytes {tensor.offset} to "
                f"{tensor.offset + tensor.nbytes}, the file has {size}",
                hint=_AGAIN,
            )
        tensors[name] = tensor
    return GgufHeader(path, metadata, tensors, (path,), (start,))


def _tensor(path: Path, source: _Bytes) -> tuple[str, int, tuple[int, ...], int]:
    """Take a tensor's name, type, shape and place apart."""
    name, dimensions = source.text(_LONGEST_NAME), source.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    sizes = [source.number("Q") for _ in range(dimensions)]
    if not all(sizes):
        raise ValueError(f"{name} is {sizes}")
    return name, source.number("I"), tuple(reversed(sizes)), source.number("Q")
