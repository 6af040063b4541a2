"""Outputs that take no more: full disks and pipes whose reader has gone."""

import errno
import io
import os
import sys

import pytest

from hybrid.cli import app


class Refusing(io.StringIO):
    """A stream that refuses what is written, as the operating system does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def flush(self) -> None:
        """Refuse as late as a buffered stream does."""
        raise OSError(self.number, os.strerror(self.number))


def test_a_full_disk_is_one_error(monkeypatch, capsys):
    """The system's words, and no traceback."""
    monkeypatch.setattr(sys, "stdout", Refusing(errno.ENOSPC))
    assert app.main(["--help"]) == 2
    assert capsys.readouterr().err.startswith("error: the output cannot be written: No space")


def test_a_pipe_that_ends_is_no_error_to_tell(monkeypatch, capsys):
    """``head`` has seen enough: the program ends, quietly, as typer does it."""
    monkeypatch.setattr(sys, "stdout", Refusing(errno.EPIPE))
    with pytest.raises(SystemExit) as ended:
        app.main(["--help"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == ""


def test_where_nothing_can_be_said_the_exit_code_says_it(monkeypatch):
    """stderr may be full, too."""

    class Full(io.StringIO):
        def write(self, words: str) -> int:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stderr", Full())
    assert app.main(["no-such-command"]) == 2
