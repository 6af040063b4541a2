"""Ctrl-C at any moment of the ``hybrid`` command: exit code 130, and nothing on the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: What the installed command runs.
PROGRAM = "from hybrid.cli import command\nsys.exit(command())\n"
#: What is imported before an interruption can be taken. (The first is no more than a name.)
BEFORE = {
    *("__future__", "hybrid", "cpu_experts", "hybrid.registration"),
    *("hybrid.cli", "hybrid.cli.exit_codes"),
}


def run(code: str, *words: str, bare: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program; ``bare`` without anything that is installed."""
    options = ["-S"] if bare else []
    return subprocess.run(
        [sys.executable, *options, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "module",
    ["signal", "hybrid.cli.app", "typer", "logging", "hybrid.errors", "hybrid.cli.env", "psutil"],
)
def test_while_anything_is_imported(module: str) -> None:
    """Our own modules and others' alike, whether they are for all commands or for one."""
    interrupt = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.stdout.write('interrupted')\n"
        "            raise KeyboardInterrupt\n"
        f"sys.modules.pop({module!r}, None)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    done = run(interrupt + PROGRAM, "env")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "interrupted", "")


def test_next_to_nothing_is_imported_before() -> None:
    """Until the command can take an interruption, a few of our own modules are all it needs
    beyond what Python begins with; these are so small that nobody meets them."""
    code = (
        "import sys, os\n"
        "there = set(sys.modules)\n"
        "from hybrid.cli import command\n"
        "print(*sorted(set(sys.modules) - there))\n"
    )
    done = run(code, bare=True)
    assert done.stderr == ""
    assert set(done.stdout.split()) <= BEFORE


#: Interrupts itself while Python ends.
LATE = (
    "import atexit, os, signal, sys\n"
    "atexit.register(print, 'not reached')\n"
    "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="no signals between processes there")


@posix
@pytest.mark.usefixtures("interruptible")
def test_when_the_work_is_done() -> None:
    """While Python ends, the program is ended as by any signal, which shells count as 130."""
    done = run(LATE + PROGRAM, "--version")
    assert (done.returncode, done.stderr) == (-2, "")
    assert "not reached" not in done.stdout


@posix
def test_what_the_parent_ignores_stays_ignored() -> None:
    """A background job of a script is not ended by a Ctrl-C that is meant for others."""
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = run(ignoring + LATE.replace("not reached", "reached") + PROGRAM, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("reached\n")
