"""Reads what the files of a checkpoint directory say of themselves: links, indexes, headers.

Loads neither torch nor transformers, so plans can look, too. Nothing is read but JSON and the
headers of weight files, and every header is checked before anything is believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError, UnsupportedModelError

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
AGAIN = "download the file again, or copy it again from where it came"

#: By a safetensors header's name of a type: torch's name of it, and the bytes of one value.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
#: A header of more than this many bytes is damage, not metadata (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000
#: How weights are called that are of other kinds.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
#: What else safetensors can hold, of which nothing here makes weights.
_NOT_READ = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


#: What reading a damaged table raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its type as the header names it, shape and first byte."""

    key: str
    path: Path
    stored: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> Any:
        """The type as torch has it."""
        import torch

        return getattr(torch, DTYPES[self.stored][0])

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension (of everything for a scalar)."""
        return DTYPES[self.stored][1] * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return DTYPES[self.stored][1] * math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check one file's header.

    Raises
    ------
    CheckpointError
        When the file cannot be opened, is cut short, or its header is not what the format
        promises.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if prefix == b"version ":
                raise CheckpointError(
                    f"{path} is a Git LFS pointer to weights, not the weights",
                    hint="fetch them with 'git lfs pull', or with 'hf download'",
                )
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: its header should take {length} "
                    f"bytes, the file has {size}",
                    hint=AGAIN,
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    start = 8 + length
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] in _NOT_READ:
                raise UnsupportedModelError(
                    f"{path} holds {key} as {entry['dtype']}, which is not read",
                    hint=f"read are: {', '.join(DTYPES)}",
                )
        infos = {
            key: TensorInfo(
                key,
                path,
                _known(entry["dtype"]),
                tuple(_size(n) for n in entry["shape"]),
                start + int(entry["data_offsets"][0]),
            )
            for key, entry in header.items()
        }
        ends = {key: start + int(entry["data_offsets"][1]) for key, entry in header.items()}
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({type(error).__name__}: {error})",
            hint=AGAIN,
        ) from error
    end = start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end or info.nbytes != ends[info.key] - info.offset:
            raise CheckpointError(
                f"{path} has a damaged safetensors header: {info.key} {list(info.shape)} lies at "
                f"bytes {info.offset} to {ends[info.key]}, expected {end} to {end + info.nbytes}",
                hint=AGAIN,
            )
        end = ends[info.key]
    if end != size:
        raise CheckpointError(
            f"{path} is {'cut short' if size < end else 'too long'}: "
            f"its header describes {end} bytes, the file has {size}",
            hint=AGAIN,
        )
    return infos


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file or folder that the system does not let us read."""
    return CheckpointError(
        f"cannot read {path}: {error.strerror or error}",
        hint="check that it exists and that you may read it",
    )


def _known(stored: str) -> str:
    DTYPES[stored]
    return stored


def _size(number: Any) -> int:
    size = int(number)
    if size < 0:
        raise ValueError(f"a size of {size}")
    return size


def read_json(path: Path) -> Any:
    """Read a JSON file, with a typed error when it cannot be read or parsed."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except RecursionError:
        raise CheckpointError(f"{path} is not valid JSON: nested too deep", hint=AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint=AGAIN) from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a table of settings.

    Raises
    ------
    CheckpointError
        When it cannot be read or parsed, or holds something else.
    """
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path} holds a {type(table).__name__}, not a table of settings",
            hint="it must be a JSON object, as save_pretrained writes it",
        )
    return table


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that make up a checkpoint directory, as transformers does.

    ``model.safetensors`` comes before an index that does not name it.

    Raises
    ------
    CheckpointError
        When the directory is missing, unreadable, or has no (or not all of its) weights.
    """
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise unreadable(directory, error) from error
    wanted = indexed_files(directory) if INDEX_NAME in names else []
    if WEIGHTS_NAME in names and WEIGHTS_NAME not in wanted:
        wanted = [WEIGHTS_NAME]
    elif not wanted:
        wanted = _all_shards(directory, sorted(n for n in names if n.endswith(".safetensors")))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(
            f"{directory} has {len(wanted) - len(missing)} of the {len(wanted)} weight files "
            f"that its index names; missing: {few(missing)}",
            hint=_unnamed(directory, names, wanted)
            or "finish the download: 'hf download' goes on where it stopped",
        )
    if not wanted:
        others = sorted(n for n in names if n.endswith(_OTHER_WEIGHTS) and n != "experts.bin")
        raise CheckpointError(
            f"{directory} holds no safetensors weights: neither {WEIGHTS_NAME} nor several files"
            + (f", but {few(others)}" if others else ""),
            hint=_other_place(directory)
            or "give the folder of a Hugging Face model with config.json and *.safetensors",
        )
    paths = [directory / name for name in wanted]
    for path in paths:
        if not path.exists():  # its name is there
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}, which is not there",
                hint="download the model again: what it was a link to was moved or deleted",
            )
    return paths


def indexed_files(directory: Path) -> list[str]:
    """Return the names of the weight files that a directory's index names."""
    return sorted(set(_weight_map(directory).values()))


def check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Compare an index with the headers of the files that it names.

    Raises
    ------
    CheckpointError
        When it names tensors that they do not have: it, or some file, is of another checkpoint.
    """
    lacking = {key: name for key, name in _weight_map(directory).items() if key not in tensors}
    if lacking:
        key, name = next(iter(lacking.items()))
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {len(lacking)} tensors that its files do not have, "
            f"such as {key} in {name}",
            hint=f"the index or {name} is of another checkpoint: download both again",
        )


def _weight_map(directory: Path) -> dict[str, str]:
    index = read_json(directory / INDEX_NAME)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{directory / INDEX_NAME} names no weight files", hint=AGAIN)
    odd = next((name for name in named.values() if not _is_file_name(name)), None)
    if odd is not None:
        raise CheckpointError(
            f"{directory / INDEX_NAME} names {odd!r}, which is no file beside it", hint=AGAIN
        )
    return named


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


def _all_shards(directory: Path, names: list[str]) -> list[str]:
    """Return the weight files of a directory without an index; refuse a part of numbered ones."""
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    for match in shards:
        stem, total = match[1], int(match[3])
        numbers = {int(m[2]) for m in shards if m[1] == stem and int(m[3]) == total}
        missing = sorted(set(range(1, min(total, 99_999) + 1)) - numbers)
        if missing:
            raise CheckpointError(
                f"{directory} has {len(numbers)} of {total} weight files like {match[0]}, "
                f"and no index; missing: {few(str(number) for number in missing)}",
                hint="finish the download: 'hf download' goes on where it stopped",
            )
    return names


def _unnamed(directory: Path, names: set[str], wanted: list[str]) -> str:
    """Say which weight files there are besides those that an index names; empty for none."""
    others = sorted(n for n in names if n.endswith(".safetensors") and n not in wanted)
    if not others:
        return ""
    return (
        f"the index does not name {few(others)}: it may be an old one; "
        f"download {INDEX_NAME} again, or finish the download"
    )


def _other_place(directory: Path) -> str:
    """Say where the model lies if this is a folder of the hub's cache around it."""
    return next(
        (
            f"this is a folder of the hub's cache; give {snapshot}"
            for snapshot in sorted(directory.glob("snapshots/*"))
            if (snapshot / "config.json").exists()
        ),
        "",
    )


def identity(config_file: Path, files: Iterable[Path], samples: int = 64) -> str:
    """Return a digest that tells one set of weights from another without reading all of it.

    Covers the config, every header, and ``samples`` pages spread over each file: two
    fine-tunes of one model differ in the pages although their headers are equal.
    """
    digest = hashlib.sha256(config_file.read_bytes())
    for path in sorted(files):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0]
            digest.update(f"{path.name}:{size}:".encode())
            digest.update(file.read(length))
            step = max(4096, (size - 8 - length) // samples)
            for at in range(8 + length, size, step):
                file.seek(at)
                digest.update(file.read(4096))
    return digest.hexdigest()


def few(names: Iterable[str], most: int = 3) -> str:
    """List the first of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
