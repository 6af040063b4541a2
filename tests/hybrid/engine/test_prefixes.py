"""The tree of beginnings beside a list of all sequences that it was told of."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_experts.decoder.pages import PAGE, Pages
from hybrid.engine.prefixes import Prefixes, common

SIZE = Pages([(1, 2)], 1 << 20, 1).page_bytes

part = st.sampled_from([[1] * 20, [2] * PAGE, [1] * (PAGE - 20), [3] * 7, [2, 1] * 40])
sequences = st.lists(part, min_size=1, max_size=5).map(
    lambda parts: [token for each in parts for token in each]
)


def _remember(pages: Pages, prefixes: Prefixes, ids: list[int]) -> None:
    """What a text does that goes on from what is known, and ends."""
    known = prefixes.longest(ids[:-1])
    sequence = pages.open(known.pages, known.tokens)
    sequence.make_room(len(ids) - known.tokens)
    sequence.advance(len(ids) - known.tokens)
    prefixes.add(ids, sequence.pages)
    sequence.close()


@given(st.lists(sequences, max_size=8), sequences)
@settings(deadline=None)
def test_the_longest_beginning_is_found(known: list[list[int]], asked: list[int]) -> None:
    """With memory for all, as long as any of them begins alike; in as many pages."""
    pages = Pages([(1, 2)], 200 * SIZE, 2)
    prefixes = Prefixes(pages)
    for ids in known:
        _remember(pages, prefixes, ids)
        pages.check_integrity(prefixes.held())
    found = prefixes.longest(asked)
    assert found.tokens == max((common(ids, asked) for ids in known), default=0)
    assert len(found.pages) == -(-found.tokens // PAGE)
    assert prefixes.tokens <= sum(map(len, known))
    prefixes.clear()
    pages.check_integrity()
    assert (pages.free, prefixes.tokens) == (pages.count, 0)


@given(st.lists(sequences, min_size=1, max_size=12))
@settings(deadline=None)
def test_little_memory_forgets_and_loses_nothing(known: list[list[int]]) -> None:
    """What was told of last is there; every page is the tree's or free."""
    pages = Pages([(1, 2)], 8 * SIZE, 1)
    prefixes = Prefixes(pages)
    pages.reclaim = prefixes.reclaim
    for ids in known:
        _remember(pages, prefixes, ids)
        pages.check_integrity(prefixes.held())
        assert prefixes.longest(ids).tokens == len(ids)


def test_what_saves_less_is_forgotten_first() -> None:
    """Of equal age a part of a page, then the least recently used; not what somebody holds."""
    pages = Pages([(1, 2)], 4 * SIZE, 2)
    prefixes = Prefixes(pages)
    for ids in ([1] * PAGE, [2] * 9, [3] * PAGE):
        _remember(pages, prefixes, ids)

    def known(*firsts: int) -> Any:
        return [prefixes.longest([first] * PAGE).tokens for first in firsts]

    prefixes.reclaim(1)
    assert known(3, 1, 2) == [PAGE, PAGE, 0]
    holds = pages.open(prefixes.longest([3] * PAGE).pages, PAGE)
    known(1)
    prefixes.reclaim(1)
    assert known(3, 1) == [PAGE, 0]
    prefixes.reclaim(5)
    assert known(3) == [PAGE]
    holds.close()
    prefixes.reclaim(1)
    assert known(3) == [0]
