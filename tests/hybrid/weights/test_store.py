"""The expert store: what is written is what is read, and damage is found."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import StoreError
from hybrid.weights.checkpoint import convert
from hybrid.weights.store import (
    DATA_NAME,
    INDEX_NAME,
    PAGE_BYTES,
    VERSION,
    ExpertStore,
    LayerRecord,
    StoreIndex,
    header_page,
)


@pytest.fixture
def converted(tiny_model: Path, tmp_path: Path) -> Path:
    convert(tiny_model, tmp_path / "dst", experts="q8_0")
    return tmp_path / "dst"


def test_index_round_trip(converted: Path) -> None:
    """The index reads back as it was written, and its id does not depend on checksums."""
    index = StoreIndex.read(converted / INDEX_NAME)
    assert index.to_json() == (converted / INDEX_NAME).read_text()
    bare = tuple(replace(layer, checksums=()) for layer in index.layers)
    assert replace(index, layers=bare).id == index.id
    assert replace(index, format="q4_0").id != index.id


#: An index that was written before layers could have formats of their own.
VERSION_1 = {
    "kind": "hybrid expert store", "version": 1, "id": "dfc5109d5b2b267d2776ef8948bc794f",
    "page_bytes": 4096,
    "bytes": 12288, "source": {"name": "old"}, "format": "q4_0",
    "layers": [
        {
            "module": "layers.0.experts", "experts": 2, "hidden": 64, "intermediate": 32,
            "gated": True, "bias": False, "offset": 4096, "checksums": [1, 2],
        }
    ],
    "dense_format": "q8_0", "dense": {"lm_head": [50, 64]},
}  # fmt: skip


def test_version_1_opens_as_it_was(tmp_path: Path) -> None:
    """What older programs wrote reads as ever, and what they can read is written as they did."""
    path = tmp_path / INDEX_NAME
    path.write_text(json.dumps(VERSION_1))
    index = StoreIndex.read(path)
    assert index.layers[0].shape(index.format).formats == ("q4_0", "q4_0")
    assert index.format_of("lm_head") == "q8_0"
    assert json.loads(index.to_json()) == VERSION_1
    (tmp_path / DATA_NAME).write_bytes(header_page(index).ljust(index.nbytes, b"\0"))
    assert header_page(index)[8:12] == b"\1\0\0\0"
    assert ExpertStore.open(tmp_path).index == index


def test_formats_of_every_layer_and_matrix(tmp_path: Path) -> None:
    """Layers and dense modules of several formats: version 2, read back as it was written."""
    first = LayerRecord(
        module="layers.0.experts", experts=2, hidden=64, intermediate=32, gated=True, bias=False,
        offset=PAGE_BYTES, format="q4_k", down_format="q6_k",
    )  # fmt: skip
    offset = PAGE_BYTES + first.nbytes("q4_0")
    other = replace(first, module="layers.1.experts", offset=offset, format="", down_format="")
    more = replace(first, module="layers.2.experts", offset=offset + other.nbytes("q4_0"))
    index = StoreIndex(
        source={"name": "mixed"}, format="q4_0", layers=(first, other, more), dense_format="q8_0",
        dense={"lm_head": (50, 64), "embed": (50, 64)}, dense_formats={"embed": "q6_k"},
    )  # fmt: skip
    assert index.version == VERSION == 2
    assert index.experts_format == "q4_k+q6_k"
    assert [index.format_of(path) for path in index.dense] == ["q8_0", "q6_k"]
    assert replace(index, dense_formats={"embed": "q5_k"}).id != index.id
    (tmp_path / INDEX_NAME).write_text(index.to_json())
    (tmp_path / DATA_NAME).write_bytes(header_page(index).ljust(index.nbytes, b"\0"))
    store = ExpertStore.open(tmp_path)
    assert store.index == index
    for layer, fmt in zip(index.layers, ("q4_k+q6_k", "q4_0", "q4_k+q6_k"), strict=True):
        shape = layer.shape(index.format)
        assert shape.format_name == fmt
        assert store.blocks(layer).shape == (2, shape.stride)


def test_blocks_are_page_aligned_views(converted: Path) -> None:
    """Every expert starts on a page, and its bytes are the mapped file's, not a copy."""
    store = ExpertStore.open(converted, verify=True)
    for record in store.index.layers:
        blocks = store.blocks(record)
        assert record.offset % PAGE_BYTES == blocks.strides[0] % PAGE_BYTES == 0
        assert not blocks.flags.writeable
        base = blocks
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        assert isinstance(base, memoryview | mmap.mmap)


def test_opening_reads_nothing(tmp_path: Path) -> None:
    """A store far larger than memory opens at once (the file is one big hole)."""
    record = LayerRecord(
        module="layers.0.experts",
        experts=20000,
        hidden=4096,
        intermediate=4096,
        gated=True,
        bias=False,
        offset=PAGE_BYTES,
    )
    index = StoreIndex(source={"name": "hole"}, format="q4_0", layers=(record,))
    (tmp_path / INDEX_NAME).write_text(index.to_json())
    with (tmp_path / DATA_NAME).open("wb") as file:
        file.write(header_page(index))
        file.truncate(index.nbytes)
    store = ExpertStore.open(tmp_path)
    assert store.blocks(record).nbytes > 500 * 2**30
    assert store.blocks(record)[-1, -1] == 0


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_truncated_data(converted: Path) -> None:
    """A data file that lost its end is refused with both sizes."""
    path = converted / DATA_NAME
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(StoreError, match=f"should have {size} bytes, it has {size - 1}"):
        ExpertStore.open(converted)


def test_flipped_bit_is_found_by_verify(converted: Path) -> None:
    """One bit in one expert: opening does not look, verifying names the expert."""
    index = StoreIndex.read(converted / INDEX_NAME)
    record = index.layers[1]
    flip(converted / DATA_NAME, record.offset + 5 * record.shape("q8_0").stride + 7)
    store = ExpertStore.open(converted)
    with pytest.raises(StoreError, match=f"expert 5 of {record.module} differ"):
        store.verify()
    with pytest.raises(StoreError, match="is damaged"):
        ExpertStore.open(converted, verify=True)


def _newer_index(folder: Path) -> None:
    body = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps(body | {"version": VERSION + 1}))


def _edited_index(folder: Path) -> None:
    body = json.loads((folder / INDEX_NAME).read_text())
    body["layers"][0]["hidden"] += 32
    (folder / INDEX_NAME).write_text(json.dumps(body))


def _newer_data(folder: Path) -> None:
    with (folder / DATA_NAME).open("r+b") as file:
        file.seek(8)
        file.write((VERSION + 1).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_newer_index, f"has version {VERSION + 1}, this program reads up to version {VERSION}"),
        (_newer_data, f"has version {VERSION + 1}, this program reads up to version {VERSION}"),
        (_edited_index, "is damaged: it says store"),
        (lambda f: (f / INDEX_NAME).write_text("{"), "is not valid JSON"),
        (lambda f: (f / INDEX_NAME).write_text("[]"), "is not the index of an expert store"),
        (lambda f: (f / INDEX_NAME).unlink(), "cannot read .*experts.json: No such file"),
        (lambda f: (f / DATA_NAME).unlink(), "cannot read .*experts.bin: No such file"),
        (lambda f: (f / DATA_NAME).write_bytes(b"zip"), "is not an expert store"),
        (lambda f: (f / DATA_NAME).write_bytes(b""), "is not an expert store"),
        (lambda f: flip(f / DATA_NAME, 20), "belongs to another model"),
    ],
)
def test_damage(converted: Path, damage: Callable[[Path], None], message: str) -> None:
    """Each kind of damage has its own message and a remedy."""
    damage(converted)
    with pytest.raises(StoreError, match=message) as caught:
        ExpertStore.open(converted)
    assert caught.value.hint


def test_data_of_another_model(converted: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Another store's data file under this index is recognised although it opens."""
    convert(tiny_model, tmp_path / "other", experts="q4_0")
    (tmp_path / "other" / DATA_NAME).replace(converted / DATA_NAME)
    with pytest.raises(StoreError, match="belongs to another model: it is store"):
        ExpertStore.open(converted)
