"""What is drafted, by what was learned: no draft that does not pay, none for long that did not."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid.ask.speculate import MOST_DRAFTED, Speculate
from hybrid.errors import UsageError
from hybrid.loop.speculation import Speculation, StepSeconds
from hybrid.loop.timed_steps import step_seconds

REPEATED = [3, 1, 4, 1, 5, 9, 2, 6] * 3


def _run(
    speculation: Speculation,
    text: list[int],
    seconds: Any,
    prompt: list[int] = REPEATED,
) -> tuple[float, float, Any]:
    """Write ``text``; return the seconds of its steps, of single ones, and what came of drafts."""
    drafts = speculation.begin(prompt)
    assert drafts is not None
    spent_s, place = 0.0, 0
    while place < len(text):
        draft = drafts.propose(len(text) - place - 1)
        new = 1
        while new <= len(draft) and draft[new - 1] == text[place + new - 1]:
            new += 1
        for token in text[place : place + new]:
            drafts.add(token)
        place += new
        step_s = seconds(len(draft) + 1)
        spent_s += step_s
        drafts.took(len(draft) + 1, new, step_s)
    return spent_s, len(text) * seconds(1), drafts.summary()


def test_drafts_pay_where_a_text_repeats_itself() -> None:
    """With steps that hardly take longer for more tokens, nearly as many come as are computed."""
    text = REPEATED * 20
    spent_s, single_s, found = _run(
        Speculation(Speculate.of("auto")), text, lambda n: 0.05 * (1 + 0.02 * (n - 1))
    )
    assert found.accepted == found.drafted > 300
    assert spent_s < 0.2 * single_s
    assert found.gained_s == pytest.approx(single_s - spent_s, rel=1e-6)


@pytest.mark.parametrize("kind", ["no repeats", "false repeats", "dear steps", "late single steps"])
def test_no_text_takes_longer_with_drafts(kind: str) -> None:
    """A fiftieth at most is lost to what was not known at first, however long the text is."""
    text = {
        "no repeats": list(range(100, 500)),
        # Every second pair is followed by something else than before.
        "false repeats": [token for at in range(400) for token in (1, 2, 3, 1000 + at)],
        "dear steps": REPEATED * 20,
        "late single steps": REPEATED * 20,
    }[kind]
    dear = kind in ("dear steps", "late single steps")
    speculation = Speculation(Speculate.of("auto"))
    late = [False]

    def seconds(tokens: int) -> float:
        if kind == "late single steps":  # a cache that changes its layout
            extra, late[0] = (0.4 if late[0] and tokens == 1 else 0.0), tokens > 1
            return 0.05 + 0.001 * (tokens - 1) + extra
        return 0.05 if tokens == 1 else 0.05 + 0.4 * dear + 0.001 * tokens

    drafts_s, _, found = _run(speculation, text, seconds)
    single_s = 0.05 * len(text)
    if kind == "late single steps":
        assert found.gained_s == pytest.approx(single_s - drafts_s, abs=0.5)
        return
    assert drafts_s < 1.02 * single_s + 0.45
    if kind == "no repeats":
        assert found.drafted == 0
    again_s, _, _ = _run(speculation, text, seconds)
    assert again_s < 1.02 * single_s + 0.05


def test_steps_that_were_timed_beforehand_are_not_tried() -> None:
    """Where a step of a few tokens takes ten times as long by itself, nothing is drafted."""
    speculation = Speculation(Speculate.of("auto"), {1: 0.01, 2: 0.1, 16: 0.2})
    spent_s, single_s, found = _run(
        speculation, REPEATED * 20, lambda n: 0.01 if n == 1 else 0.1 + 0.007 * n
    )
    assert found.steps == 0
    assert spent_s == pytest.approx(single_s)


def test_step_times_lie_between_those_that_were_seen() -> None:
    """What was timed beforehand moves with single steps; what was learned is added for each token.

    A disturbed step changes little, and what was learned long ago is doubted.
    """
    seconds = StepSeconds({1: 1.0, 2: 1.5, 10: 5.5})
    seconds.learn(1, 3.0)
    expected = [3.0, 3.5, 5.5, 7.5, 7.5]
    assert [seconds.of(n) for n in (1, 2, 6, 10, 16)] == pytest.approx(expected, rel=0.01)
    for _ in range(40):
        seconds.learn(6, 9.5)
    assert seconds.of(6) == pytest.approx(9.5, rel=0.01)
    assert seconds.of(10) == pytest.approx(7.5 + 9 * 0.8, rel=0.01)
    seconds.learn(6, 1e6)
    assert seconds.of(6) < 2 * 9.5
    for _ in range(8000):
        seconds.learn(1, 3.0)
    assert seconds.of(6) == pytest.approx(3.0, rel=0.01)
    assert StepSeconds().single is None
    nothing = StepSeconds()
    nothing.learn(1, 2.0)
    assert nothing.of(9) == 2.0


def test_so_many_as_are_asked_for() -> None:
    """A number drafts wherever the text repeats itself, never beyond the room that there is."""
    drafts = Speculation(Speculate.of(5)).begin(REPEATED)
    assert drafts is not None
    assert drafts.propose(100) == REPEATED[:5]
    assert drafts.propose(2) == REPEATED[:2]
    assert drafts.propose(0) == []
    drafts.refused = "no"
    assert drafts.propose(100) == []
    assert Speculation(Speculate.of("off")).begin(REPEATED) is None


@pytest.mark.parametrize("asked", ["mtp", "0", 0, -1, MOST_DRAFTED + 1, True, 2.5, "", [1]])
def test_what_cannot_be_asked(asked: Any) -> None:
    """Neither a word that is known nor a number of tokens."""
    with pytest.raises(UsageError, match="speculate is") as caught:
        Speculate.of(asked)
    assert "auto, off, lookup" in str(caught.value)


def test_what_can_be_asked() -> None:
    """As a value and as a text."""
    assert Speculate.of(None) == Speculate.of("auto") == Speculate()
    assert str(Speculate.of("7")) == str(Speculate.of(7)) == "lookup of 7"
    assert str(Speculate.of("lookup")) == "lookup"


def test_steps_are_timed_before(network: Any) -> None:
    """Of 1, 2 and 16 tokens; where nothing can be taken back, of none."""
    found = step_seconds(network)
    assert list(found) == [1, 2, 16]
    assert all(seconds > 0 for seconds in found.values())
