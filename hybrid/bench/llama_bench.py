"""Runs a ``llama-bench`` that the user built: llama.cpp's or one of its relatives'.

Both write the same JSON. To start after tokens that are already in the cache, llama.cpp has ``-d``
and ik_llama.cpp ``-gp``; which one it is, its own help says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hybrid.bench.cases import Case
from hybrid.errors import UsageError
from hybrid.paths import expanded


class LlamaBench:
    """One such program, which loads the model anew for every measurement.

    Attributes
    ----------
    name
        What the user calls it.
    about
        Which build it says it is, with the options it was given; unknown before it ran.
    """

    def __init__(self, name: str, command: list[str], path: Path, threads: int) -> None:
        self.name = name
        self.about = f"build unknown, {' '.join(command[1:]) or 'no options'}"
        self._command = command
        self._model = ["-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]
        self._depth = "-d" if "--n-depth" in _run([command[0], "--help"], name) else "-gp"

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        if not case.decode:
            wanted = ["-p", str(case.prompt), "-n", "0"]
        elif self._depth == "-d":
            wanted = ["-p", "0", "-n", str(case.generate), "-d", str(case.prompt)]
        else:
            wanted = ["-p", "0", "-n", "0", "-gp", f"{case.prompt},{case.generate}"]
        said = _run([*self._command, *self._model, *wanted], self.name)
        row = self._row(said)
        build = row.get("build_commit", "unknown"), row.get("build_number", "unknown")
        options = " ".join(self._command[1:])
        self.about = f"build {build[0]} ({build[1]}), {options or 'no options'}"
        seconds = float(row["avg_ns"]) / 1e9
        return seconds / case.generate if case.decode else seconds

    def _row(self, said: str) -> dict[str, Any]:
        """Return its only measurement."""
        try:
            rows = json.loads(said[said.index("[") :])
            (row,) = rows
            float(row["avg_ns"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.name} answered with no measurement: {said.strip()[:80]!r}",
                hint=f"{self._command[0]} must be a llama-bench that knows '-o json'",
            ) from error
        return dict(row)


def parse_peer(given: str) -> tuple[str, list[str]]:
    """Return name and command of ``NAME=PATH/TO/llama-bench [OPTION ...]``.

    Raises
    ------
    UsageError
        When it is written otherwise, or there is no such program.
    """
    name, equals, rest = given.partition("=")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"--peer {given!r}: {error}", hint="close the quotation") from error
    if not (name.strip() and equals and words):
        raise UsageError(
            f"--peer {given!r} does not say which program is called what",
            hint="write --peer 'NAME=PATH/TO/llama-bench', options after the path",
        )
    path = expanded(words[0])
    if not (path.is_file() and os.access(path, os.X_OK)):
        what = "no program that can be run" if path.exists() else "not there"
        raise UsageError(f"--peer {name.strip()}: {path} is {what}", hint="name a llama-bench")
    return name.strip(), [str(path.resolve()), *words[1:]]


def _run(command: list[str], name: str) -> str:
    """Return what a program wrote to stdout, without our own OpenMP settings.

    A help may end with any code; anything else that fails is told with the last words it said.
    """
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UsageError(
            f"{name} cannot be started: {error}", hint="name a llama-bench built for this machine"
        ) from error
    if done.returncode and "--help" not in command:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UsageError(
            f"{name} ended with code {done.returncode}, its last words: {last}",
            hint=f"try it alone: {shlex.join(command)}",
        )
    return done.stdout
