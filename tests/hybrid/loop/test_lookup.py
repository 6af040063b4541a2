"""Drafts from the text so far, beside a search from scratch."""

from __future__ import annotations

import random

import pytest

from hybrid.loop.lookup import LONGEST, Lookup


def _place(text: list[int]) -> tuple[int, int]:
    """The last place with three tokens before it that end the text, or two, and how many there."""
    for length in (3, 2):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                while (
                    length < min(LONGEST, place)
                    and text[place - 1 - length] == text[len(text) - 1 - length]
                ):
                    length += 1
                return place, length
    return 0, 0


@pytest.mark.parametrize("seed", range(5))
def test_the_place_is_the_last_that_reads_alike(seed: int) -> None:
    """Followed as long as it foretells what comes, and looked for anew where it does not."""
    tell = random.Random(seed)
    text = [tell.randrange(4) for _ in range(12)]
    lookup = Lookup(text)
    place, alike = _place(text)
    for _ in range(300):
        assert lookup.alike == alike
        assert lookup.next == (text[place] if alike else None)
        token = text[place] if alike and tell.random() < 0.6 else tell.randrange(4)
        follows = alike and token == text[place]
        text.append(token)
        lookup.add(token)
        place, alike = (place + 1, min(alike + 1, LONGEST)) if follows else _place(text)


def test_drafts_go_on_by_themselves() -> None:
    """What repeats itself is drafted again and again; what ends at nothing is not."""
    lookup = Lookup([7, 1, 2, 3, 1, 2, 3, 1])
    assert lookup.alike == 4
    assert lookup.draft(8) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert lookup.draft(0) == []
    assert Lookup([5, 5, 5]).draft(3) == [5, 5, 5]
    for nothing in ([], [1], [1, 2, 3, 4]):
        assert Lookup(nothing).alike == 0
        assert Lookup(nothing).draft(3) == []
