"""Requests that are answered at once: each as alone, whoever joins, leaves or waits beside it."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.cli import main
from hybrid.engine.opening import open_together
from hybrid.engine.together import Together
from hybrid.errors import UsageError
from hybrid.serve.engine import Asked, Done, Engine, Failed, Job, Piece
from hybrid.serve.refusals import Refusal
from hybrid.session.model import HybridModel
from readers import GREEDY, LONG_S, Reader, text_of

DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 40}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> HybridModel:
    """A model without an end token: it writes as much as it is asked to."""
    return HybridModel.from_pretrained(tiny_model, threads=1, dtype="float32")


@pytest.fixture
def together(tiny: HybridModel) -> Together:
    return Together(tiny, 4, 1 << 24)


@pytest.fixture
def many(tiny: HybridModel, together: Together) -> Iterator[Engine]:
    made = Engine(tiny, waiting=3, together=together)
    yield made
    made.end(0)


def alone(model: HybridModel, asked: Asked) -> str:
    if asked.seed is not None:
        torch.manual_seed(asked.seed)
    return model.write(asked.ids, max_new_tokens=asked.most, **asked.options).text


def asks(model: HybridModel) -> list[Asked]:
    """Four requests of other lengths, greedy ones and such with a seed."""
    texts = ("some text", "abcdefgh" * 90, "some text of its own", "x")
    return [
        Asked(model.encode(text), 20 + 9 * at, dict(options), seed=seed)
        for at, (text, (options, seed)) in enumerate(
            zip(texts, ((GREEDY, None), (DRAWN, 5), (DRAWN, 6), (GREEDY, None)), strict=True)
        )
    ]


def test_four_requests_are_answered_as_alone(tiny: HybridModel, many: Engine) -> None:
    """Asked from threads of their own, twice."""
    given = asks(tiny)
    wanted = [alone(tiny, asked) for asked in given]
    for _ in range(2):
        found: dict[int, str] = {}

        def ask(at: int, found: dict[int, str] = found) -> None:
            events = Reader(given[at], many).all()
            assert isinstance(events[-1], Done)
            found[at] = text_of(events)

        threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[at] for at in range(4)] == wanted


def test_more_than_may_wait_are_refused(tiny: HybridModel, many: Engine) -> None:
    """Four are answered and three wait; whoever leaves makes room, and the rest is answered."""
    endless = Asked(tiny.encode("some text"), 2000, dict(GREEDY))
    readers = [Reader(endless, many) for _ in range(7)]
    with pytest.raises(Refusal, match=r"7 requests .* no more than 3 may wait") as caught:
        Reader(endless, many)
    assert caught.value.status == 429
    many.leave(readers[6].job)
    assert readers[6].refusal().status == 499
    short = Asked(tiny.encode("some text"), 3, dict(GREEDY))
    last = Reader(short, many)
    for reader in readers[:4]:  # until they write
        assert isinstance(reader.events.get(timeout=LONG_S), Piece)
    for reader in readers[:6]:
        many.leave(reader.job)
    for reader in readers[:4]:
        done = reader.all()[-1]
        assert isinstance(done, Done)
        assert done.generation.ended == "interrupted"
    assert text_of(last.all()) == alone(tiny, short)
    assert many.jobs == 0


def test_a_reader_leaves_within_a_step(tiny: HybridModel, many: Engine) -> None:
    """The others go on as if nobody had."""
    other = Asked(tiny.encode("another text"), 60, dict(GREEDY))
    beside = Reader(other, many)
    checks: list[int] = []

    class Leaving(Job):
        """Leaves at its fourth token."""

        def check(self, at: Any = None) -> None:
            if isinstance(at, torch.Tensor):
                checks.append(at.numel())
            if len(checks) == 5:
                self.left.set()
            super().check(at)

    done = Reader(Asked(tiny.encode("some text"), 500, dict(GREEDY)), many, Leaving).all()[-1]
    assert isinstance(done, Done)
    assert checks == [9, 1, 1, 1, 1]
    assert done.generation.ended == "interrupted"
    assert text_of(beside.all()) == alone(tiny, other)


def test_a_request_that_goes_alone_waits_for_the_others(
    tiny: HybridModel, many: Engine, together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody joins meanwhile; all are answered."""
    given = asks(tiny)
    real, seen = together.admit, list[int]()

    def admit(writing: Any, *args: Any) -> bool:
        if writing.ids.shape[1] == 1:  # the last of the four
            seen.append(len(together.running))
            return False
        return real(writing, *args)

    monkeypatch.setattr(together, "admit", admit)
    readers = [Reader(given[at], many) for at in (0, 3, 1, 2)]
    found = [text_of(reader.all()) for reader in readers]
    assert found == [alone(tiny, given[at]) for at in (0, 3, 1, 2)]
    assert seen == [1]


def test_a_prompt_beyond_the_memory_is_refused(tiny: HybridModel) -> None:
    """With both numbers and the protocol's status; the next one is answered."""
    page = Together(tiny, 2, 1 << 20)._memory.many.pages.page_bytes  # type: ignore[union-attr]
    engine = Engine(tiny, 2, Together(tiny, 2, 3 * page))
    try:
        refusal = Reader(Asked(tiny.encode("x" * 130), 5, dict(GREEDY)), engine).refusal()
        assert (refusal.status, refusal.code) == (413, "context_length_exceeded")
        assert "has 130 tokens and the cache of all texts holds 128" in refusal.message
        short = Asked(tiny.encode("x"), 5, dict(GREEDY))
        assert text_of(Reader(short, engine).all()) == alone(tiny, short)
    finally:
        engine.end(0)


def test_the_end_cuts_off_all_that_run(tiny: HybridModel, many: Engine) -> None:
    """Those that wait are refused; nobody is left without a last event."""
    readers = [Reader(Asked(tiny.encode("text"), 1900, dict(GREEDY)), many) for _ in range(6)]
    many.end(0.05)
    for reader in readers:
        last = reader.all()[-1]
        assert isinstance(last, Failed)
        assert last.refusal.status == 503


def test_nothing_is_left_of_many_that_come_and_go(
    tiny: HybridModel, many: Engine, together: Together
) -> None:
    """Hundreds of readers, of which some leave at once, some later and some stay."""
    choose = random.Random(3)
    given = asks(tiny)
    wanted = [alone(tiny, asked) for asked in given]
    open_: list[tuple[Reader, int]] = []
    for _ in range(200):
        at = choose.randrange(4)
        try:
            open_.append((Reader(given[at], many), at))
        except Refusal:
            reader, at = open_.pop(choose.randrange(len(open_)))
            if choose.random() < 0.5:
                many.leave(reader.job)
                reader.all()
            else:
                events = reader.all()
                assert isinstance(events[-1], Done)
                assert text_of(events) == wanted[at]
    for reader, at in open_:
        assert text_of(reader.all()) == wanted[at]
    assert many.jobs == 0
    assert together.running == []
    together.check_integrity()


def test_what_is_opened_says_how_it_answers(tiny: HybridModel) -> None:
    """Together where that is asked for and there is memory; else one after the other, and why."""
    opened, told = open_together(tiny, 3, None, 512)
    assert opened is not None
    assert opened.room == 2048  # as long as the model takes
    assert "up to 3 answers at once, 2048 tokens of cache" in told
    assert open_together(tiny, 1, None, 512) == (
        None,
        "one answer after the other, as --parallel 1 asks",
    )
    with pytest.raises(UsageError, match=r"--cache 1\.0 KiB holds less than 64 tokens"):
        open_together(tiny, 3, 1024, 512)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--cache", "much"], "--cache 'much' is not a size"),
        (["--parallel", "0"], "--parallel"),
        (["--cache", "900000GiB"], "--cache"),
    ],
)
def test_wrong_values_are_refused(
    given: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded, with what is wrong."""
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    assert main(["serve", "--port", "0", *given]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="ends a program by a signal")
def test_a_restart_goes_on_from_what_was_kept(tmp_path: Path, interruptible: None) -> None:
    """The same request before and after: the same answer, its prompt known the second time."""
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    answers = [_asked_of_a_program(tmp_path / "kept") for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    known = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in answers]
    assert known == [0, answers[0]["usage"]["prompt_tokens"] - 1]


def _asked_of_a_program(folder: Path) -> dict[str, Any]:
    """Start a server that keeps what it knows in a folder, ask it once, and end it."""
    command = [sys.executable, "-m", "hybrid", "serve", "--port", "0", "--threads", "1"]
    command += ["--prefix-cache", str(folder), "--prefix-cache-size", "1GiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        url = None
        for line in program.stderr:
            if url := re.search(r"answers on http://([\d.:]+)/v1", line):
                break
        assert url is not None
        connection = http.client.HTTPConnection(url[1], timeout=LONG_S)
        body = {"prompt": "def main(argv):\n    " * 9, "max_tokens": 5, "temperature": 0}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = dict(json.loads(connection.getresponse().read()))
        connection.close()
        program.send_signal(signal.SIGTERM)
        told = program.stderr.read()
        assert program.wait(LONG_S) == 0
    assert "tokens of texts are kept in" in told
    return answer
