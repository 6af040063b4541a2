"""Remembers the keys and values of token sequences, so that who begins alike goes on from them.

A tree: every node is a page of the memory and the tokens whose keys and values it has, those of its
parent before it. Inner nodes are whole pages; a leaf may have fewer tokens. Pages are shared with
the sequences that are under way, which never write into them
(:meth:`cpu_experts.decoder.pages.PagedSequence.make_room`).

When pages are wanted, leaves are forgotten that nobody else holds, in the order of

    priority = clock + tokens saved per page, of the last use

where ``clock`` is the priority of the one that was forgotten last (GreedyDual-Size: Cao and Irani,
1997). Among leaves that save as much this is the least recently used one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cpu_experts.decoder.pages import PAGE, Pages


class Prefix(NamedTuple):
    """What is known of a sequence's beginning: so many ``tokens``, in these ``pages``."""

    tokens: int
    pages: list[int]


class Known(NamedTuple):
    """A page and its tokens, ``behind`` the one of that number in a list, or -1."""

    behind: int
    ids: tuple[int, ...]
    page: int


class _Node:
    """A page and its tokens; ``children`` go on behind them."""

    def __init__(self, ids: tuple[int, ...], page: int, parent: _Node | None) -> None:
        self.ids, self.page, self.parent = ids, page, parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self.priority = (0.0, 0)


class Prefixes:
    """The tree.

    Parameters
    ----------
    pages
        The memory.

    Attributes
    ----------
    tokens
        That it has the keys and values of.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._root = _Node((), -1, None)
        self._clock, self._uses = 0.0, 0
        self.tokens = 0

    def longest(self, ids: Sequence[int]) -> Prefix:
        """Return what is known of the beginning of ``ids``; whoever goes on from it holds it."""
        node, found, length = self._root, list[int](), 0
        while length < len(ids):
            part = tuple(ids[length : length + PAGE])
            child = node.children.get(part)
            alike = len(part)
            if child is None:
                alike, child = max(
                    ((common(each.ids, part), each) for each in node.children.values()),
                    key=lambda pair: pair[0],
                    default=(0, None),
                )
            if child is None or not alike:
                break
            self._touch(child)
            found.append(child.page)
            length += alike
            if alike < PAGE:
                break
            node = child
        return Prefix(length, found)

    def add(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Remember a sequence whose keys and values of ``ids`` are in ``pages``.

        Nobody writes into the last one of them any more, if it is not whole. What is known already
        stays where it is.
        """
        node = self._root
        for first, page in zip(range(0, len(ids), PAGE), pages, strict=True):
            part = tuple(ids[first : first + PAGE])
            child = node.children.get(part)
            if child is None:
                shorter = [each for each in node.children.values() if _begins(part, each.ids)]
                if any(_begins(each.ids, part) for each in node.children.values()):
                    return  # a part of a page that is known whole
                for each in shorter:
                    self._forget(each)
                child = node.children[part] = _Node(part, page, node)
                self._pages.hold((page,))
                self.tokens += len(part)
            self._touch(child)
            node = child

    def latest(self, count: int) -> list[Known]:
        """Return up to so many pages, those that would be forgotten last, each behind its own."""
        found: list[Known] = []
        places: dict[_Node, int] = {self._root: -1}
        for leaf in sorted(self._leaves(), key=lambda leaf: leaf.priority, reverse=True):
            path = [leaf]
            while path[-1].parent is not None and path[-1].parent not in places:
                path.append(path[-1].parent)
            for node in path[::-1][: count - len(found)]:
                assert node.parent is not None
                places[node] = len(found)
                found.append(Known(places[node.parent], node.ids, node.page))
        return found

    def restore(self, known: Sequence[Known]) -> None:
        """Take what :meth:`latest` returned, in pages that are its own from here on.

        Nothing is known before.
        """
        nodes: list[_Node] = []
        for behind, ids, page in known:
            parent = self._root if behind < 0 else nodes[behind]
            node = parent.children[ids] = _Node(ids, page, parent)
            self.tokens += len(ids)
            nodes.append(node)
        for node in nodes[::-1]:  # what is first in the list was used last
            self._touch(node)

    def reclaim(self, missing: int) -> None:
        """Forget what it takes to free so many pages, or all that frees any."""
        while missing > 0:
            loose = [leaf for leaf in self._leaves() if self._pages.holders(leaf.page) == 1]
            if not loose:
                return
            loose.sort(key=lambda leaf: leaf.priority)
            for leaf in loose[:missing]:
                self._clock = max(self._clock, leaf.priority[0])
                self._forget(leaf)
            missing -= len(loose[:missing])

    def clear(self) -> None:
        """Forget everything."""
        while leaves := list(self._leaves()):
            for leaf in leaves:
                self._forget(leaf)

    def held(self) -> Iterator[int]:
        """Yield the pages that it holds."""
        for node in self._nodes():
            yield node.page

    def _touch(self, node: _Node) -> None:
        self._uses += 1
        node.priority = (self._clock + len(node.ids) / PAGE, self._uses)

    def _forget(self, leaf: _Node) -> None:
        assert not leaf.children
        assert leaf.parent is not None
        del leaf.parent.children[leaf.ids]
        self.tokens -= len(leaf.ids)
        self._pages.give((leaf.page,))

    def _leaves(self) -> Iterator[_Node]:
        return (node for node in self._nodes() if not node.children)

    def _nodes(self) -> Iterator[_Node]:
        open_ = [self._root]
        while open_:
            node = open_.pop()
            if node is not self._root:
                yield node
            open_ += node.children.values()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    for at, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return at
    return min(len(one), len(other))


def _begins(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return len(beginning) < len(ids) and tuple(ids[: len(beginning)]) == tuple(beginning)
