"""Large pages: what is written in them, and dense weights that are moved there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid.packed.dense import Arena
from hybrid.weights import huge_pages
from hybrid.weights.huge_pages import PAGE_BYTES, AlignedWriter, large_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Noted:
    """A raw file that notes its writes, and takes only part of some."""

    def __init__(self, path: Path, most: int = 1 << 30) -> None:
        self.file = path.open("w+b", buffering=0)
        self.writes: list[tuple[int, int]] = []
        self._most = most

    def write(self, data: memoryview) -> int:
        self.writes.append((self.file.tell(), len(data)))
        return self.file.write(data[: self._most])

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_a_file_is_written_in_whole_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of any size, from any position: the same bytes, whole pages but at the ends."""
    monkeypatch.setattr(huge_pages, "PAGE_BYTES", 64)
    rng = np.random.default_rng(0)
    sizes = [1, 100, 63, 64, 200, 5]
    parts = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    noted = _Noted(tmp_path / "file")
    writer = AlignedWriter(noted)
    writer.seek(10)
    for part in parts:
        writer.write(part.data)
    writer.seek(500)
    writer.write(b"end")
    writer.flush()
    data = (tmp_path / "file").read_bytes()
    assert data[10 : 10 + sum(sizes)] == b"".join(part.tobytes() for part in parts)
    assert data[500:] == b"end"
    starts = [start for start, size in noted.writes if size]
    assert starts[0] == 10
    assert all(start % 64 == 0 for start in starts[1:-1])


def test_a_write_that_takes_part_is_gone_on_with(tmp_path: Path) -> None:
    """The system may take fewer bytes than it was given."""
    writer = AlignedWriter(_Noted(tmp_path / "file", most=7))
    writer.write(bytes(range(50)))
    writer.flush()
    assert (tmp_path / "file").read_bytes() == bytes(range(50))


def _large_bytes() -> int:
    """What of this process's own memory lies in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHuge"))


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="no large pages here"
)
def test_memory_comes_in_large_pages() -> None:
    """Asked for, written to and counted by the system."""
    before = _large_bytes()
    memory = large_pages(8 * PAGE_BYTES)
    np.frombuffer(memory, np.uint8)[:] = 1
    assert _large_bytes() - before >= 4 * PAGE_BYTES


def test_moved_tensors_stay_themselves() -> None:
    """Content, type and shape are kept, and whoever shares the tensor sees the same memory."""
    arena = Arena()
    tensors = [torch.arange(5), torch.rand(3, 4), torch.rand(0), torch.rand(1 << 20)]
    wanted = [tensor.clone() for tensor in tensors]
    shared = torch.nn.Parameter(torch.rand(7), requires_grad=True)
    tensors.append(shared)
    wanted.append(shared.detach().clone())
    for tensor in tensors:
        arena.move(tensor)
    for tensor, want in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, want)
        assert tensor.shape == want.shape
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    assert all(address % 64 == 0 for address in addresses)
    assert len(set(addresses)) == len(addresses)
    assert shared.requires_grad
