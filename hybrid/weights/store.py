"""Writes and opens the packed expert store: ``experts.bin`` and its JSON index, memory-mapped.

``experts.bin`` starts with one page that names the store; then, layer by layer, the experts'
blocks follow (see :mod:`hybrid.formats.block`), each starting on a page of its own. The index
says what lies where and holds a CRC-32 of every block. Opening a store reads the index and
maps the file; an expert's bytes come from disk when they are first used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import StoreError
from hybrid.formats.block import Block
from hybrid.formats.errors import HybridError
from hybrid.formats.strips import pad
from hybrid.machine import host
from hybrid.weights.huge_pages import ask_for_large_pages

DATA_NAME = "experts.bin"
INDEX_NAME = "experts.json"
VERSION = 2
PAGE_BYTES = 4096

_MAGIC = b"HYBRIDEX"
_KIND = "hybrid expert store"
_REMAKE = "convert the model again with 'hybrid convert'"

U8 = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """The experts of one layer: what they are and where they lie.

    Parameters
    ----------
    module
        Path of the experts module in the model, e.g. ``model.layers.0.mlp.experts``.
    experts
        E, the number of experts.
    hidden, intermediate, gated, bias
        As in :class:`hybrid.formats.block.Block`.
    offset
        First byte in ``experts.bin``.
    format, down_format
        Weight formats of this layer's gate and up, and of its down; empty where they are the
        store's (:attr:`StoreIndex.format`) and the same as gate's.
    checksums
        CRC-32 of each expert's block; empty while the layer is being written.
    """

    module: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    bias: bool
    offset: int
    checksums: tuple[int, ...] = ()
    format: str = ""
    down_format: str = ""

    def shape(self, fmt: str) -> Block:
        """Return the layout of the experts, on whole pages; their arithmetic is the model's.

        ``fmt`` is the store's format.
        """
        up, _, down = (self.format or fmt).partition("+")
        block = Block(
            hidden=self.hidden,
            intermediate=self.intermediate,
            format=up,
            down_format=self.down_format or down,
            gated=self.gated,
            bias=self.bias,
        )
        return block.with_stride(pad(block.block_bytes, PAGE_BYTES))

    def nbytes(self, fmt: str) -> int:
        """Bytes of all experts."""
        return self.experts * self.shape(fmt).stride


@dataclass(frozen=True, kw_only=True)
class StoreIndex:
    """What ``experts.json`` says.

    Parameters
    ----------
    source
        ``name`` and ``identity`` of the checkpoint that the store was made from.
    format
        Weight format of the experts, or two as ``UP+DOWN`` (``Block.format_name``), but for layers
        that have their own.
    layers
        In file order.
    dense_format
        What dense weights were asked for in; None leaves them as the checkpoint has them.
    dense
        Quantized dense modules: path to ``[rows, cols]``.
    dense_formats
        Formats of those that have another than ``dense_format``, by path.
    """

    source: dict[str, str]
    format: str
    layers: tuple[LayerRecord, ...]
    dense_format: str | None = None
    dense: dict[str, tuple[int, int]] = field(default_factory=dict)
    dense_formats: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The oldest version that says all of this: one format for everything is version 1."""
        own = any(layer.format or layer.down_format for layer in self.layers)
        return 2 if own or self.dense_formats or "+" in self.format else 1

    @property
    def experts_format(self) -> str:
        """The formats that most layers' experts have, as one word (``Block.format_name``)."""
        names = [layer.shape(self.format).format_name for layer in self.layers]
        return Counter(names).most_common(1)[0][0] if names else self.format

    def format_of(self, path: str) -> str | None:
        """The format of a dense module."""
        return self.dense_formats.get(path, self.dense_format)

    @property
    def id(self) -> str:
        """What makes this store this store: everything but the checksums."""
        plan = self._plan()
        for layer in plan["layers"]:
            del layer["checksums"]
        canonical = json.dumps(plan, sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        """Size of ``experts.bin``."""
        return PAGE_BYTES + sum(layer.nbytes(self.format) for layer in self.layers)

    def to_json(self) -> str:
        body = {"kind": _KIND, "version": self.version, "id": self.id, "page_bytes": PAGE_BYTES}
        return json.dumps(body | {"bytes": self.nbytes} | self._plan(), indent=1) + "\n"

    def _plan(self) -> dict[str, Any]:
        """All values, but for formats that version 1 does not know."""
        plan = asdict(self)
        if self.version == 1:
            del plan["dense_formats"]
            for layer in plan["layers"]:
                del layer["format"], layer["down_format"]
        return plan

    @classmethod
    def read(cls, path: Path) -> StoreIndex:
        """Read an index.

        Raises
        ------
        StoreError
            When it is missing, damaged, or of a newer version than this program knows.
        """
        try:
            body = json.loads(path.read_bytes())
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}", hint=_REMAKE) from error
        except RecursionError:
            raise StoreError(f"{path} is not valid JSON: nested too deep", hint=_REMAKE) from None
        except ValueError as error:
            raise StoreError(f"{path} is not valid JSON: {error}", hint=_REMAKE) from error
        if not isinstance(body, dict) or body.get("kind") != _KIND:
            raise StoreError(f"{path} is not the index of an expert store", hint=_REMAKE)
        _check_version(path, body.get("version"))
        try:
            index = cls(
                source=dict(body["source"]),
                format=body["format"],
                layers=tuple(
                    LayerRecord(**layer | {"checksums": tuple(layer["checksums"])})
                    for layer in body["layers"]
                ),
                dense_format=body["dense_format"],
                dense={name: (int(n), int(k)) for name, (n, k) in body["dense"].items()},
                dense_formats=dict(body.get("dense_formats", {})),
            )
            intact = index.id == body["id"] and index.nbytes == body["bytes"]
        except (KeyError, TypeError, ValueError, AttributeError, HybridError) as error:
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}: {error})", hint=_REMAKE
            ) from error
        if not intact:
            raise StoreError(
                f"{path} is damaged: it says store {body['id']}, its content makes {index.id}",
                hint=_REMAKE,
            )
        return index


def _check_version(path: Path, version: Any) -> None:
    if not isinstance(version, int) or version < 1:
        raise StoreError(f"{path} has no valid version: {version!r}", hint=_REMAKE)
    if version > VERSION:
        raise StoreError(
            f"{path} has version {version}, this program reads up to version {VERSION}",
            hint="upgrade hybrid-moe, or convert the model again with this version",
        )


def header_page(index: StoreIndex) -> bytes:
    """Return the first page of ``experts.bin``."""
    head = _MAGIC + struct.pack("<I", index.version) + index.id.encode()
    return head.ljust(PAGE_BYTES, b"\0")


class ExpertStore:
    """An opened store; use :meth:`open`.

    Attributes
    ----------
    path, index
        The directory and what its index says.
    """

    def __init__(self, path: Path, index: StoreIndex, mapped: mmap.mmap) -> None:
        self.path = path
        self.index = index
        self._mapped = mapped
        self._data: U8 = np.frombuffer(mapped, np.uint8)

    def __reduce__(self) -> Any:
        """A copy maps the same file."""
        return ExpertStore.open, (self.path,)

    @classmethod
    def open(cls, directory: Path | str, *, verify: bool = False) -> ExpertStore:
        """Map a converted directory's experts; nothing is read but the index and one page.

        Parameters
        ----------
        directory
            Where ``experts.bin`` and ``experts.json`` lie.
        verify
            Also read every expert and compare its checksum.

        Raises
        ------
        StoreError
            When the store is missing, cut short, newer than this program, when the two files
            do not belong together, or when a checksum differs.
        """
        path = Path(directory).absolute()  # found again whatever becomes the working folder
        index = StoreIndex.read(path / INDEX_NAME)
        file_path = path / DATA_NAME
        try:
            with file_path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(PAGE_BYTES)
                if not head.startswith(_MAGIC) or len(head) < PAGE_BYTES:
                    raise StoreError(f"{file_path} is not an expert store", hint=_REMAKE)
                _check_version(file_path, struct.unpack_from("<I", head, len(_MAGIC))[0])
                if head != header_page(index):
                    other = head[len(_MAGIC) + 4 :].rstrip(b"\0").decode(errors="replace")
                    raise StoreError(
                        f"{file_path} belongs to another model: it is store {other}, "
                        f"{INDEX_NAME} describes store {index.id}",
                        hint=_REMAKE,
                    )
                if size != index.nbytes:
                    raise StoreError(
                        f"{file_path} should have {index.nbytes} bytes, it has {size}",
                        hint="copy it again, or " + _REMAKE,
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StoreError(f"cannot read {file_path}: {error.strerror}", hint=_REMAKE) from error
        if size <= host.memory_bytes() // 2:
            # A store that memory holds in part would lose room to neighbours it has no use for.
            ask_for_large_pages(mapped)
        store = cls(path, index, mapped)
        if verify:
            store.verify()
        return store

    def blocks(self, record: LayerRecord) -> U8:
        """Return one layer's experts, ``[E, stride]`` uint8, as a read-only view of the file."""
        size = record.nbytes(self.index.format)
        flat = self._data[record.offset : record.offset + size]
        return flat.reshape(record.experts, -1)

    def pages(self, size: int) -> U8:
        """Return the first ``size`` bytes of the file as a read-only view."""
        return self._data[:size]

    def read_ahead(self, layer: int, experts: Iterable[int]) -> None:
        """Ask the system to read experts of the ``layer``-th record from disk, without waiting.

        Does nothing where the system takes no such advice (Windows).
        """
        if not hasattr(self._mapped, "madvise"):
            return
        record = self.index.layers[layer]
        stride = record.shape(self.index.format).stride
        for expert in experts:
            # Blocks start and end on pages; the system's own may be larger than the file's.
            start = (record.offset + expert * stride) // mmap.PAGESIZE * mmap.PAGESIZE
            end = record.offset + (expert + 1) * stride
            self._mapped.madvise(mmap.MADV_WILLNEED, start, end - start)

    def verify(self) -> None:
        """Compare every expert with its checksum.

        Raises
        ------
        StoreError
            Naming the damaged experts' layers.
        """
        damaged = [
            f"expert {expert} of {record.module}"
            for record in self.index.layers
            for expert in damaged_experts(self.blocks(record), record.checksums)
        ]
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise StoreError(
                f"{self.path / DATA_NAME} is damaged: {', '.join(damaged[:3])}{more} differ "
                "from their checksums",
                hint="copy it again, or " + _REMAKE,
            )


def damaged_experts(blocks: U8, checksums: tuple[int, ...]) -> Iterator[int]:
    """Yield the experts whose bytes differ from their checksum (or that have none)."""
    for expert, block in enumerate(blocks):
        if expert >= len(checksums) or zlib.crc32(block) != checksums[expert]:
            yield expert
