"""Keys and values of many sequences in one memory, which come and go without copies.

The memory is cut into pages. A page has the keys and values of all layers for :data:`PAGE`
positions of a sequence, and may be of several sequences that begin alike: it belongs to whoever
holds it, and is free when nobody does. A page that others hold, too, is copied before a sequence
writes into it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpu_experts.decoder.records import STATE
from hybrid.formats.errors import HybridError, ShapeError
from hybrid.formats.strips import F32, TILE, pad

#: Positions of a page. A sequence has on average half a page that is not filled, less than a
#: tenth of it from 320 positions on; attention reads a page's values of a head in one go.
PAGE = 64
#: Bytes that pages begin at multiples of.
_LINE = 64
#: Positions by which buffers of single steps grow.
_ROOM = 4096


class PagesFull(HybridError):  # noqa: N818 (a state of the memory, which the caller may change)
    """All pages are held; ``missing`` more are needed."""

    def __init__(self, missing: int, count: int) -> None:
        super().__init__(
            f"{missing} more pages of {PAGE} tokens of cache are needed, all {count} are held",
            hint="let a sequence end, or give the cache more memory",
        )
        self.missing = missing


def page_bytes(stored: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of a page of layers that keep so many heads of a size."""
    numbers = sum(heads * PAGE * (dim + pad(dim, TILE)) for heads, dim in stored)
    return pad(2 * numbers, _LINE)


class Pages:
    """The memory, and who holds which page of it.

    Parameters
    ----------
    stored
        For every layer how many heads it keeps, and their size
        (:attr:`cpu_experts.decoder.layers.Layer.stored`).
    size_bytes
        Memory for all of them; it is taken from the system as pages are first written.
    sequences
        That are open at once, at most.

    Attributes
    ----------
    states
        What the kernels are given, ``[sequences, layers]`` of :data:`~.records.STATE`.
    stored
        See above.
    page_bytes
        Of a page, all layers together.
    count
        Pages in all.
    reclaim
        Asked for so many pages when too few are free, before :class:`PagesFull` is raised; it may
        :meth:`give` back what it holds.

    Raises
    ------
    ShapeError
        When not a single page fits.
    """

    def __init__(self, stored: Sequence[tuple[int, int]], size_bytes: int, sequences: int) -> None:
        self.stored = [list(each) for each in stored]
        self.heads = np.array([heads for heads, _ in stored], np.int64)
        self._dims = [dim for _, dim in stored]
        self._offsets, end = [], 0
        for heads, dim in stored:
            self._offsets.append((end, end + 2 * heads * PAGE * dim))
            end += 2 * heads * PAGE * (dim + pad(dim, TILE))
        self.page_bytes = page_bytes(stored)
        self.count = size_bytes // self.page_bytes
        if self.count < 1:
            raise ShapeError(
                f"{size_bytes} bytes of cache hold no page of {PAGE} tokens, which has "
                f"{self.page_bytes}"
            )
        whole = np.zeros(self.count * self.page_bytes + _LINE, np.uint8)
        first = -whole.ctypes.data % _LINE
        self._memory = whole[first : first + self.count * self.page_bytes]
        self.states = np.zeros((sequences, len(stored)), STATE)
        self._tables = np.zeros((sequences, self.count), np.int64)
        at = self._memory.ctypes.data
        for layer, (keys, values) in enumerate(self._offsets):
            self.states["keys"][:, layer] = at + keys
            self.states["values"][:, layer] = at + values
        self.states["page"] = PAGE
        self.states["table"] = (
            self._tables.ctypes.data + np.arange(sequences) * self._tables.strides[0]
        )[:, None]
        self._held = np.zeros(self.count, np.int64)
        self._free = list(range(self.count - 1, -1, -1))
        self._rows = list(range(sequences - 1, -1, -1))
        self._open: dict[int, PagedSequence] = {}
        self.reclaim: Callable[[int], None] = lambda missing: None

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used_bytes(self) -> int:
        """Memory of the pages that somebody holds."""
        return (self.count - self.free) * self.page_bytes

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return int(self._held[page])

    def open(self, pages: Sequence[int] = (), length: int = 0) -> PagedSequence:
        """Return a new sequence, whose first ``length`` positions lie in ``pages`` of others.

        Raises
        ------
        ShapeError
            When as many sequences are open as may be, or ``pages`` are not as many as hold those.
        """
        if not self._rows:
            raise ShapeError(f"{len(self._open)} sequences are open, as many as may be")
        if len(pages) != -(-length // PAGE):
            raise ShapeError(f"{len(pages)} pages of {PAGE} are given for {length} positions")
        row = self._rows.pop()
        self.hold(pages)
        sequence = self._open[row] = PagedSequence(self, row, pages, length)
        return sequence

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that somebody holds already."""
        for page in pages:
            assert self._held[page] > 0
            self._held[page] += 1

    def give(self, pages: Iterable[int]) -> None:
        """Hold pages no longer."""
        for page in pages:
            assert self._held[page] > 0
            self._held[page] -= 1
            if not self._held[page]:
                self._free.append(page)

    def take(self, count: int) -> list[int]:
        """Return so many free pages, which the caller then holds.

        Raises
        ------
        PagesFull
            When there are too few; nothing is taken then.
        """
        if count > len(self._free):
            self.reclaim(count - len(self._free))
        if count > len(self._free):
            raise PagesFull(count - len(self._free), self.count)
        taken = [self._free.pop() for _ in range(count)]
        self._held[taken] = 1
        return taken

    def copied(self, page: int) -> int:
        """Return a page of the caller's with what ``page``, which it holds, has; gives that back.

        Raises
        ------
        PagesFull
            When no page is free.
        """
        (new,) = self.take(1)
        self.content(new)[:] = self.content(page)
        self.give((page,))
        return new

    def content(self, page: int) -> NDArray[np.uint8]:
        """Return the bytes of a page, to read or to write."""
        return self._memory[page * self.page_bytes : (page + 1) * self.page_bytes]

    def table(self, row: int) -> NDArray[np.int64]:
        """Where the pages of a sequence are, in bytes."""
        found: NDArray[np.int64] = self._tables[row]
        return found

    def closed(self, sequence: PagedSequence) -> None:
        """Take a sequence's row back."""
        del self._open[sequence.row]
        self._rows.append(sequence.row)

    def check_integrity(self, others: Iterable[int] = ()) -> None:
        """Assert that every page is held by open sequences and ``others``, and else free."""
        wanted = Counter(others)
        for sequence in self._open.values():
            wanted.update(sequence.pages)
            assert len(sequence.pages) * PAGE >= sequence.length()
        held = {page: int(count) for page, count in enumerate(self._held) if count}
        assert held == dict(wanted), f"held are {held}, by those who are there {dict(wanted)}"
        assert sorted([*self._free, *held]) == list(range(self.count))
        assert len(self._rows) + len(self._open) == len(self.states)

    def read(self, page: int, layer: int) -> tuple[F32, F32]:
        """Return a page's keys and values of a layer as new arrays ``[H, PAGE, dim]``."""
        heads, dim = int(self.heads[layer]), self._dims[layer]
        keys, values = self._offsets[layer]
        halves = self.content(page).view(np.float16)
        strips = pad(dim, TILE) // TILE
        packed = halves[keys // 2 : values // 2].reshape(heads, PAGE // TILE, dim, TILE)
        found = packed.swapaxes(2, 3).reshape(heads, PAGE, dim)
        end = values // 2 + heads * strips * PAGE * TILE
        side = halves[values // 2 : end].reshape(heads, strips, PAGE, TILE)
        wide = side.swapaxes(1, 2).reshape(heads, PAGE, strips * TILE)[:, :, :dim]
        return found.astype(np.float32), wide.astype(np.float32)


class PagedSequence:
    """Keys and values of one sequence; :meth:`Pages.open` makes it.

    Attributes
    ----------
    of
        The memory that it lies in.
    row
        Of :attr:`Pages.states` that is its.
    pages
        Those that it holds, in order.
    states
        What the kernels are given of it, ``[layers]``.
    heads
        How many heads every layer keeps.
    """

    def __init__(self, pages: Pages, row: int, held: Sequence[int], length: int) -> None:
        self.of, self.row, self.pages = pages, row, list(held)
        self.states = pages.states[row]
        self.heads = pages.heads
        self._table = pages.table(row)
        self.states["length"], self.states["beyond"] = length, 0
        self._point(0)

    def length(self, layer: int = 0) -> int:
        """How many positions a layer holds."""
        return int(self.states[layer]["length"])

    @property
    def capacity(self) -> int:
        """Positions that buffers of single steps are to be made for."""
        return pad(max(1, len(self.pages) * PAGE), _ROOM)

    @property
    def beyond(self) -> bool:
        """Whether a number that was written since was too large for half precision."""
        return bool(self.states["beyond"].any())

    def make_room(self, count: int = 1) -> None:
        """Make room for ``count`` more positions, in pages that nobody else holds.

        Raises
        ------
        PagesFull
            When there are too few; the sequence is as before then.
        """
        length = self.length()
        if length % PAGE and self.of.holders(self.pages[last := length // PAGE]) > 1:
            self.pages[last] = self.of.copied(self.pages[last])
            self._point(last)
        missing = -(-(length + count) // PAGE) - len(self.pages)
        if missing > 0:
            first = len(self.pages)
            self.pages += self.of.take(missing)
            self._point(first)

    def reserve(self, layer: int, count: int) -> None:
        """Assert that there is room for ``count`` more positions of a layer."""
        assert self.length(layer) + count <= len(self.pages) * PAGE

    def advance(self, count: int = 1) -> None:
        """Count the positions that a step has written."""
        self.states["length"] += count

    def advance_layer(self, layer: int, count: int) -> None:
        """Count ``count`` positions that one layer has written."""
        self.states[layer]["length"] += count

    def cut(self, length: int) -> None:
        """Forget all positions from ``length`` on, and give back the pages behind it."""
        self.states["length"] = np.minimum(self.states["length"], length)
        self.states["beyond"] = 0
        needed = -(-length // PAGE)
        self.of.give(self.pages[needed:])
        del self.pages[needed:]
        self._point(needed)

    def fork(self) -> PagedSequence:
        """Return another sequence that goes on from here; both hold the same pages.

        Raises
        ------
        ShapeError
            When as many sequences are open as may be.
        """
        length = self.length()
        return self.of.open(self.pages[: -(-length // PAGE)], length)

    def close(self) -> None:
        """Give everything back; the sequence is of no use from here on."""
        self.of.give(self.pages)
        self.pages.clear()
        self.of.closed(self)

    def read(self, layer: int) -> tuple[F32, F32]:
        """Return what a layer holds as new arrays ``[H, T, dim]``."""
        keys, values = zip(*(self.of.read(page, layer) for page in self.pages), strict=True)
        length = self.length(layer)
        return np.concatenate(keys, 1)[:, :length], np.concatenate(values, 1)[:, :length]

    def _point(self, first: int) -> None:
        """Tell the kernels where the pages from the one at ``first`` on are."""
        size, end = self.of.page_bytes, len(self.pages)
        self._table[first:end] = np.array(self.pages[first:], np.int64) * size
        self.states["capacity"] = end * PAGE
