"""The engine: order, queue, readers who leave, errors, and an end in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.errors import UsageError
from hybrid.fast.prompt import PromptProgress
from hybrid.serve.engine import Asked, Done, Engine, Job, Piece
from hybrid.serve.refusals import Refusal
from hybrid.session.model import HybridModel
from readers import GREEDY, LONG_S, Reader, text_of


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> HybridModel:
    """A model without an end token: it writes as much as it is asked to."""
    return HybridModel.from_pretrained(tiny_model, threads=1)


class Gate:
    """Stands where the model stands: writes what it was asked once it is let, or left."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.go = threading.Semaphore(0)

    def write(self, ids: Any, *, on_text: Any, streamer: Any, **_: Any) -> Any:
        self.begun.put(ids)
        while not self.go.acquire(timeout=0.005):
            streamer.put(None)
        if isinstance(ids, Exception):
            raise ids
        on_text(f"<{ids}>")
        return ids


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> Iterator[Engine]:
    made = Engine(gate, waiting=2)  # type: ignore[arg-type]
    yield made
    made.end(0)


def test_requests_are_answered_in_order(engine: Engine, gate: Gate) -> None:
    """One at a time; each reader has its own answer."""
    readers = [Reader(name, engine) for name in ("a", "b", "c")]
    for name, reader in zip("abc", readers, strict=True):
        assert gate.begun.get(timeout=LONG_S) == name
        assert gate.begun.empty()
        gate.go.release()
        piece, done = reader.all()
        assert piece == Piece(f"<{name}>")
        assert isinstance(done, Done)
        assert done.generation == name  # type: ignore[comparison-overlap]


def test_a_full_queue_refuses(engine: Engine, gate: Gate) -> None:
    """With both numbers and a time; whoever leaves makes room."""
    readers = [Reader(name, engine) for name in "abc"]
    with pytest.raises(Refusal, match=r"3 requests .* no more than 2") as caught:
        Reader("d", engine)
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    engine.leave(readers[1].job)
    assert readers[1].refusal().status == 499
    readers.append(Reader("d", engine))
    for name, reader in zip("acd", (readers[0], *readers[2:]), strict=True):
        assert gate.begun.get(timeout=LONG_S) == name
        gate.go.release()
        assert len(reader.all()) == 2
    assert engine.jobs == 0


def test_a_reader_who_leaves_frees_the_engine(engine: Engine, gate: Gate) -> None:
    """The running answer ends, the next begins."""
    first, second = Reader("a", engine), Reader("b", engine)
    assert gate.begun.get(timeout=LONG_S) == "a"
    engine.leave(first.job)
    assert first.refusal().status == 499
    assert gate.begun.get(timeout=LONG_S) == "b"
    gate.go.release()
    assert len(second.all()) == 2
    engine.leave(second.job)  # as every reader does in the end


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UsageError("no such thing", hint="take another"), 400, "no such thing (take another)"),
        (UsageError("no such thing", hint="give --other"), 400, "no such thing"),
        (RuntimeError("a secret"), 500, "RuntimeError"),
    ],
)
def test_an_error_is_one_request_s(
    engine: Engine, gate: Gate, error: Exception, status: int, words: str, capsys: Any
) -> None:
    """The next is answered; what is ours is shown here and not told to the reader."""
    failed, fine = Reader(error, engine), Reader("b", engine)
    gate.go.release(2)
    refusal = failed.refusal()
    assert refusal.status == status
    assert words in refusal.message
    assert "secret" not in refusal.message
    assert "--" not in refusal.message
    assert ("a secret" in capsys.readouterr().err) == (status == 500)
    assert len(fine.all()) == 2


def test_the_end_lets_the_running_answer_finish(engine: Engine, gate: Gate) -> None:
    """Those that wait are refused at once, and so is who comes later."""
    running, waiting = Reader("a", engine), Reader("b", engine)
    assert gate.begun.get(timeout=LONG_S) == "a"
    ending = threading.Thread(target=engine.end, args=(LONG_S,))
    ending.start()
    assert waiting.refusal().status == 503
    with pytest.raises(Refusal) as caught:
        Reader("c", engine)
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers
    gate.go.release()
    assert isinstance(running.all()[-1], Done)
    ending.join(LONG_S)
    assert not ending.is_alive()


def test_the_end_cuts_off_what_takes_too_long(engine: Engine, gate: Gate) -> None:
    """Its reader is told."""
    running = Reader("a", engine)
    assert gate.begun.get(timeout=LONG_S) == "a"
    engine.end(0.01)
    assert running.refusal().status == 503


def ids_of(model: HybridModel, text: str, most: int) -> Asked:
    return Asked(model.encode(text), most, dict(GREEDY))


@pytest.fixture
def real(tiny: HybridModel) -> Iterator[Engine]:
    made = Engine(tiny, waiting=8)
    yield made
    made.end(0)


def test_an_answer_ends_within_a_token(real: Engine, tiny: HybridModel) -> None:
    """From when its reader leaves; the next answer goes on from its cache and is as ever."""
    asked = ids_of(tiny, "some text", 500)
    wanted = tiny.generate("some text", max_new_tokens=20, **GREEDY)
    left_at: list[int] = []

    class Leaving(Job):
        """Leaves after its third check, which comes with every token."""

        checks = 0

        def check(self, at: Any = None) -> None:
            if isinstance(at, torch.Tensor):
                self.checks += 1
                left_at.append(self.checks)
            if self.checks == 4:
                self.left.set()
            super().check(at)

    done = Reader(asked, real, Leaving).all()[-1]
    assert isinstance(done, Done)
    assert done.generation.ended == "interrupted"
    assert left_at == [1, 2, 3, 4]  # the prompt, and three tokens
    assert done.generation.times.new_tokens <= 3
    events = Reader(ids_of(tiny, "some text", 20), real).all()
    assert text_of(events) == wanted
    last = events[-1]
    assert isinstance(last, Done)
    assert last.generation.times.kept_tokens == asked.ids.shape[1] - 1


def test_a_long_prompt_ends_between_its_pieces(real: Engine, tiny: HybridModel) -> None:
    """A reader who leaves meanwhile is not waited for until the first token."""
    text = "abcdefgh" * 190
    wanted = tiny.generate(text, max_new_tokens=8, **GREEDY)
    pieces: list[int] = []

    class Leaving(Job):
        def check(self, at: Any = None) -> None:
            if isinstance(at, PromptProgress):
                pieces.append(at.done)
                self.left.set()
            super().check(at)

    done = Reader(ids_of(tiny, text, 8), real, Leaving).all()[-1]
    assert len(pieces) == 1
    assert pieces[0] < len(text)
    assert isinstance(done, Done)
    assert done.generation.times.new_tokens == 0
    assert text_of(Reader(ids_of(tiny, text, 8), real).all()) == wanted
