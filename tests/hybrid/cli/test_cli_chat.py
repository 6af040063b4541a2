"""Conversations: history, commands, Ctrl-C; and how programs end that are interrupted."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hybrid.cli import main
from hybrid.cli.chat import talk
from hybrid.errors import UsageError
from hybrid.session.conversation import Conversation
from hybrid.session.model import HybridModel
from hybrid.weights.cache import converted_copy
from tiny_model import CONTEXT, TEMPLATE

posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")

Said = list[tuple[str, str]]


class Listener:
    """Stands where the model stands: answers from a list and keeps what it was asked."""

    def __init__(self, *answers: str | BaseException) -> None:
        self.answers = list(answers)
        self.asked: list[Said] = []
        self.options: list[dict[str, Any]] = []
        self.context: int | None = None
        self.ended = "end token"

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> torch.Tensor:
        self.asked.append([(m["role"], m["content"]) for m in messages])
        return torch.zeros(1, len(messages))

    def write(self, ids: torch.Tensor, *, on_text: Any, **options: Any) -> SimpleNamespace:
        self.options.append(options)
        assert ids.shape[1] == len(self.asked[-1])
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        for piece in answer.split("|"):
            if piece == "^C":
                raise KeyboardInterrupt
            on_text(piece)
        return SimpleNamespace(ended=self.ended)


def feed(*lines: str | BaseException) -> Any:
    """A read_line that gives ``lines`` and then the end of input."""
    left: Iterator[str | BaseException] = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read_line


def say(model: Listener, read_line: Any, *, system: str | None = None, **options: Any) -> None:
    """Talk with a model; the figures after an answer are those of a real one."""
    talk(Conversation(model, system=system), read_line, Mock(), **options)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["run"], "-p"),
        (["run", "-p", "a"], "--stop"),
        (["chat"], "--system"),
        (["chat"], "--stop"),
        (["chat"], "--template-arg"),
    ],
)
def test_bytes_that_are_no_text(
    command: list[str],
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an option holds is refused before a model is loaded."""
    monkeypatch.setattr("hybrid.cli.generation.load", lambda *_, **__: pytest.fail("it was loaded"))
    for wrong in ("ab\udcff", "ab\ud800"):
        assert main([*command, option, wrong]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert option == "-p" or option in error
        assert "UTF-8" in error + hint


def test_the_history_grows_and_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """Each question is asked with all that was said; /clear keeps the system message only."""
    model = Listener("on|e", "two", "three")
    say(model, feed("a", "", "b", "/clear", "c", "/exit", "d"), system="be brief")
    start = ("system", "be brief")
    first = [start, ("user", "a")]
    assert model.asked == [
        first,
        [*first, ("assistant", "one"), ("user", "b")],
        [start, ("user", "c")],
    ]
    out, err = capsys.readouterr()
    assert out == "onetwothree"
    assert "forgotten" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    """A cut answer is part of the history; a question without any answer is not."""
    model = Listener("par|^C|never", "^C", "end")
    say(model, feed("a", "b", KeyboardInterrupt(), "c"))
    said = [("user", "a"), ("assistant", "par")]
    assert model.asked[1:] == [[*said, ("user", "b")], [*said, ("user", "c")]]


def test_a_backslash_goes_on_in_the_next_line() -> None:
    """Lines that end in a backslash are one message."""
    model = Listener("x")
    say(model, feed("a\\", "b\\", "c"))
    assert model.asked == [[("user", "a\nb\nc")]]


def test_the_end_of_input_ends_a_message_too() -> None:
    """A last line that ends in a backslash is asked like any other."""
    model = Listener("x")
    say(model, feed("a\\", "b\\"))
    assert model.asked == [[("user", "a\nb")]]


def test_spaces_around_a_command_do_not_matter() -> None:
    """``/exit`` with a blank behind it is no message to the model."""
    model = Listener("x", "y")
    say(model, feed("a", "/clear ", "b", " /exit", "c"))
    assert model.asked == [[("user", "a")], [("user", "b")]]


def test_a_message_that_cannot_be_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """At a terminal the conversation goes on without it; in a pipe the program ends."""
    model = Listener(UsageError("too long", hint="shorter"), "fine")
    say(model, feed("a", "b"))
    assert model.asked[1] == [("user", "b")]
    assert "error: too long\nhint: shorter" in capsys.readouterr().err
    with pytest.raises(UsageError):
        say(Listener(UsageError("too long")), feed("a"), patient=False)


@pytest.fixture(scope="module")
def converted(tiny_model: Path) -> Path:
    """The tiny model, its converted copy in the cache already."""
    converted_copy(tiny_model, "q4_0", None)
    return tiny_model


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_chat_in_a_pipe(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    converted: Path,
    template: Path,
) -> None:
    """Lines in, answers out, each what the model makes of the template and the history."""
    model = HybridModel.from_pretrained(converted, threads=1)
    one = model.generate("[user]hé\n[assistant]", max_new_tokens=6, do_sample=False)
    two = model.generate(
        f"[user]hé\n[assistant]{one}\n[user]ho\n[assistant]", max_new_tokens=6, do_sample=False
    )
    pipe(monkeypatch, "hé\r\nho\n".encode())
    args = ["chat", str(converted), "--chat-template", str(template), "--greedy", "-n", "6"]
    assert main([*args, "-t", "1"]) == 0
    assert capsys.readouterr().out == one + two


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"ab\xff\n", "byte 0xff at offset 2"), (b"x" * CONTEXT, f"context is {CONTEXT}")],
)
def test_messages_in_a_pipe_that_cannot_be_answered(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    converted: Path,
    template: Path,
    data: bytes,
    words: str,
) -> None:
    """Invalid UTF-8 and a message longer than the context end a piped chat with exit code 2."""
    pipe(monkeypatch, data)
    assert main(["chat", str(converted), "--chat-template", str(template), "-t", "1"]) == 2
    assert words in capsys.readouterr().err


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str], converted: Path) -> None:
    """A model without a chat template is told from one that can chat, before any question."""
    assert main(["chat", str(converted), "-t", "1"]) == 2
    assert "no chat template" in capsys.readouterr().err


@contextmanager
def start(*args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The program in a process of its own, as a shell would start it; a failed test ends it."""
    with subprocess.Popen([sys.executable, "-m", "hybrid", *args], **options) as process:
        try:
            yield process
        finally:
            process.kill()


@posix
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_run_with_what_was_written(converted: Path) -> None:
    """Exit code 130, the figures so far, no traceback; what was written stays written."""
    args = ["run", str(converted), "-p", "a", "-n", str(CONTEXT), "--greedy", "-t", "1"]
    with start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + out) >= 1
    assert b"decode" in err
    assert b"Traceback" not in err


@posix
def test_a_closed_pipe_ends_a_run_quietly(converted: Path) -> None:
    """``hybrid run | head -c 1``: generation stops, with no message of Python's."""
    args = ["run", str(converted), "-p", "a", "-n", str(CONTEXT), "--greedy", "-t", "1"]
    with start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 1
    assert err == b""


@posix
@pytest.mark.usefixtures("interruptible")
def test_chat_at_a_terminal(converted: Path, template: Path) -> None:
    """A terminal session: ask, stop the answer with Ctrl-C, go on, leave with /exit."""
    import pty

    ours, theirs = pty.openpty()
    args = ["chat", str(converted), "--chat-template", str(template)]
    more = ["-n", str(CONTEXT), "--greedy", "-t", "1"]
    with start(
        *args,
        *more,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: _own_terminal(theirs),
    ) as process:
        os.close(theirs)
        screen = Screen(ours)
        screen.wait_for(b"> ")
        os.write(ours, b"hello\r")
        screen.wait_for(b"hello")
        screen.wait_for_more(20)
        os.write(ours, b"\x03")
        screen.wait_for(b"[stopped]")
        screen.wait_for(b"TTFT")
        screen.wait_for(b"> ")
        os.write(ours, b"/exit\r")
        assert process.wait(timeout=60) == 0
    os.close(ours)


def _own_terminal(fd: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


class Screen:
    """Reads what a program shows, up to the words that are waited for."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.unread = b""

    def wait_for(self, words: bytes) -> None:
        while words not in self.unread:
            self.unread += os.read(self.fd, 4096)
        self.unread = self.unread.partition(words)[2]

    def wait_for_more(self, count: int) -> None:
        while len(self.unread) < count:
            self.unread += os.read(self.fd, 4096)
