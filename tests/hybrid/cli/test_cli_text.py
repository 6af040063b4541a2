"""Where the text goes and what is said of it: files, pipes and terminals, in every pairing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_experts.jit.hostcpu import ENVIRONMENT_VARIABLE
from shared_demo import GREEDY, PROMPT

ROOT = Path(__file__).parents[3]
TEXT = "one\ntwo"
PROGRAM = (
    "import sys\n"
    "from hybrid.cli.text import apart, end_line, write\n"
    "text = sys.argv[1]\n"
    "with apart():\n"
    "    for piece in (text[:2], text[2:], ''):\n"
    "        write(piece)\n"
    "    if 'interrupted' in sys.argv:\n"
    "        end_line(interrupted=True)\n"
    "    print('how it went', file=sys.stderr)\n"
)
posix = pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")


class Ends:
    """Files, pipes and terminals to write to, and what came out of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: dict[str, int] = {}
        self._writers: dict[str, int] = {}

    def open(self, name: str) -> int:
        """Return a descriptor; the same one where a name was opened before."""
        if name not in self._writers:
            if name.startswith("file"):
                path = self._folder / name
                self._writers[name] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                self._readers[name] = os.open(path, os.O_RDONLY)
            elif name.startswith("pipe"):
                self._readers[name], self._writers[name] = os.pipe()
            else:
                import pty

                self._readers[name], self._writers[name] = pty.openpty()
        return self._writers[name]

    def read(self) -> dict[str, str]:
        """Close what was written to and return what is in it."""
        found = {}
        for name, reader in self._readers.items():
            os.close(self._writers[name])
            data = b""
            try:
                while more := os.read(reader, 4096):
                    data += more
            except OSError:  # how a terminal ends
                pass
            os.close(reader)
            found[name] = data.decode().replace("\r\n", "\n")
        return found


def show(folder: Path, out: str, err: str, *words: str) -> dict[str, str]:
    """Write a text to ``out``, tell of it on ``err``, and return what was seen of each."""
    ends = Ends(folder)
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        stdout=ends.open(out),
        stderr=ends.open(err),
        check=True,
    )
    return ends.read()


@posix
@pytest.mark.parametrize(
    ("out", "err", "seen"),
    [
        ("file", "file 2", {"file": TEXT, "file 2": "how it went\n"}),
        ("file", "file", {"file": f"{TEXT}\nhow it went\n"}),
        ("file", "terminal", {"file": TEXT, "terminal": "how it went\n"}),
        ("pipe", "pipe 2", {"pipe": TEXT, "pipe 2": "how it went\n"}),
        ("pipe", "pipe", {"pipe": f"{TEXT}\nhow it went\n"}),
        ("pipe", "file", {"pipe": TEXT, "file": "how it went\n"}),
        # What reads the pipe may show it on the same terminal.
        ("pipe", "terminal", {"pipe": TEXT, "terminal": "\nhow it went\n"}),
        ("terminal", "terminal", {"terminal": f"{TEXT}\nhow it went\n"}),
        # The shell's prompt comes next.
        ("terminal", "file", {"terminal": f"{TEXT}\n", "file": "how it went\n"}),
    ],
)
def test_what_is_said_begins_on_a_line_of_its_own(
    tmp_path: Path, out: str, err: str, seen: dict[str, str]
) -> None:
    """A text that does not end in a newline stays as it is wherever it is kept."""
    assert show(tmp_path, out, err, TEXT) == seen


@posix
@pytest.mark.parametrize("end", ["file", "pipe", "terminal"])
@pytest.mark.parametrize("text", [f"{TEXT}\n", ""])
def test_a_line_that_has_ended_is_not_ended_again(tmp_path: Path, end: str, text: str) -> None:
    """After a newline, and where there is no text, nothing is added."""
    assert show(tmp_path, end, end, text) == {end: f"{text}how it went\n"}


@posix
@pytest.mark.parametrize(
    ("out", "err", "seen"),
    [
        ("terminal", "terminal", {"terminal": f"{TEXT}\n\nhow it went\n"}),
        ("file", "terminal", {"file": f"{TEXT}\n", "terminal": "\nhow it went\n"}),
        ("file", "file", {"file": f"{TEXT}\nhow it went\n"}),
    ],
)
def test_a_terminal_has_shown_what_was_pressed(
    tmp_path: Path, out: str, err: str, seen: dict[str, str]
) -> None:
    """Behind the text that Ctrl-C stopped there is ``^C`` on a terminal, and only there."""
    assert show(tmp_path, out, err, f"{TEXT}\n", "interrupted") == seen


#: Commands that write a text, and what ends or interrupts it.
CUT = """
import logging, sys, warnings
from hybrid.cli import app, main
from hybrid.cli.text import write
from hybrid.errors import UsageError
def cut(name):
    write('one')
    {0}
app._load_command = cut
sys.exit(main(['run']))
"""


@posix
@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("raise UsageError('it is cut', hint='go on')", ["one", "error: it is cut", "hint: go on"]),
        ("1 / 0", ["one", "Traceback (most recent call last):"]),
        (
            "logging.getLogger('cpu_experts').info('a notice'); write('two'); sys.exit()",
            ["one", "a notice", "two"],
        ),
        (
            "warnings.warn_explicit('slow', UserWarning, 'a.py', 1); write('two'); sys.exit()",
            ["one", "a.py:1: UserWarning: slow", "two"],
        ),
    ],
    ids=["error", "bug", "notice", "warning"],
)
def test_whoever_speaks_begins_on_a_line_of_its_own(how: str, shown: list[str]) -> None:
    """Errors that cut a text off, tracebacks, notices and other libraries' warnings within it."""
    done = subprocess.run(
        [sys.executable, "-c", CUT.format(how)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout.splitlines()[: len(shown)] == shown


@pytest.mark.parametrize("kept", [True, False], ids=["converted before", "converted first"])
def test_the_first_minute(
    tmp_path: Path, demo_text: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo, into one pipe: progress at most, then the text, then one line of figures.

    No library says anything.
    """
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)  # which a run would speak of
    words = ["run", "--prompt", PROMPT, "--max-new-tokens", str(GREEDY["max_new_tokens"])]
    done = subprocess.run(
        [sys.executable, "-m", "hybrid", *words, "--greedy", "--threads", "1"],
        cwd=ROOT,
        env=os.environ if kept else {**os.environ, "HYBRID_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    before, text, after = done.stdout.partition(demo_text)
    assert text == demo_text
    progress = r"(Converting .* 0:00:00\n)?(compiling the kernels .*\n)?"
    assert re.fullmatch(progress, before), before
    assert ("Converting" in before) == (not kept)
    newline = "" if demo_text.endswith("\n") else "\n"
    assert re.fullmatch(rf"{newline}prompt \d+ tokens.* \| peak memory .*\n", after), after


@posix
@pytest.mark.parametrize("closed", [1, 2])
@pytest.mark.parametrize(
    "words", [("plan", "nosuch"), ("run", "-p", PROMPT, "-n", "2", "--greedy")]
)
def test_streams_that_are_closed(closed: int, words: tuple[str, ...]) -> None:
    """Whoever closes stdout or stderr gets the other one and the same exit code."""
    command = [sys.executable, "-m", "hybrid", *words]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == plain.returncode
    if closed == 2:
        assert done.stdout == plain.stdout
