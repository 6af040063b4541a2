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


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(errno.ENOSPC, 2, "error: the output cannot be written: "), (errno.EPIPE, 1, "")],
)
def test_an_output_that_takes_no_more_is_no_traceback(monkeypatch, capsys, number, code, said):
    """A full disk is one error; a pipe that ends, as ``head`` ends it, is no error to tell."""
    monkeypatch.setattr(sys, "stdout", Refusing(number))
    assert app.main(["--help"]) == code
    told = capsys.readouterr().err
    assert told.startswith(said) and bool(told) == bool(said)


def test_where_nothing_can_be_said_the_exit_code_says_it(monkeypatch):
    """stderr may be full, too."""

    class Full(io.StringIO):
        def write(self, words: str) -> int:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stderr", Full())
    assert app.main(["no-such-command"]) == 2
