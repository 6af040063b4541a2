"""A ``llama-bench`` of the user's own in ``hybrid bench peers``, both dialects made up here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.bench import peers
from hybrid.bench.cases import CASES, long_case
from hybrid.bench.llama_bench import LlamaBench, parse_peer
from hybrid.cli.app import main
from hybrid.errors import UsageError

PROGRAM = """#!{python}
import json, pathlib, sys
if "--help" in sys.argv:
    print("{help}")
    sys.exit(1)
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
assert pathlib.Path(sys.argv[sys.argv.index("-m") + 1]).read_bytes()[:4] == b"GGUF"
print("a word before")
print({answer!r})
sys.exit({code})
"""
ROW = {"build_commit": "abc123", "build_number": 7, "avg_ns": 3_200_000_000}


class Program:
    """A script that answers as ``llama-bench`` and writes down how it was called."""

    def __init__(self, folder: Path, *, depth: bool, answer: str, code: int = 0) -> None:
        self.path, self._calls = folder / "llama-bench", folder / "calls"
        options = "-d, --n-depth <n>" if depth else "-gp <pp,tg>"
        text = PROGRAM.format(
            python=sys.executable, help=options, calls=str(self._calls), answer=answer, code=code
        )
        self.path.write_text(text)
        self.path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("depth", "decode", "later"),
    [
        (True, "-p 0 -n 64 -d 32", "-p 0 -n 32 -d 4096"),
        (False, "-p 0 -n 0 -gp 32,64", "-p 0 -n 0 -gp 4096,32"),
    ],
    ids=["llama.cpp", "ik_llama.cpp"],
)
def test_what_is_asked_and_answered(
    tmp_path: Path, gguf: Path, depth: bool, decode: str, later: str
) -> None:
    """Prompts as they are, tokens after a prompt in the program's own words; seconds a token."""
    program = Program(tmp_path, depth=depth, answer=json.dumps([ROW]))
    name, command = parse_peer(f"mine={program.path} -rtr 1")
    side = LlamaBench(name, command, gguf, 2)
    assert side.about == "build unknown, -rtr 1"
    seconds = [side.measure(case) for case in (*CASES, long_case(4096))]
    assert seconds == [3.2 / 64, 3.2, 3.2, 3.2 / 32]
    assert (side.name, side.about) == ("mine", "build abc123 (7), -rtr 1")
    always = ["-rtr", "1", "-m", str(gguf), "-t", "2", "-r", "1", "-o", "json"]
    wanted = [decode, "-p 512 -n 0", "-p 32 -n 0", later]
    assert program.calls() == [always + words.split() for words in wanted]


@pytest.mark.parametrize("answer", ["", "[]", "[{}]", '[{"avg_ns": null}]', "no measurement ["])
def test_an_answer_without_a_measurement(tmp_path: Path, gguf: Path, answer: str) -> None:
    program = Program(tmp_path, depth=True, answer=answer)
    with pytest.raises(UsageError, match="mine answered with no measurement") as caught:
        LlamaBench("mine", [str(program.path)], gguf, 2).measure(CASES[0])
    assert "llama-bench" in str(caught.value.hint)


def test_a_program_that_fails(tmp_path: Path, gguf: Path) -> None:
    """Its code, its last words and how to try it alone."""
    program = Program(tmp_path, depth=True, answer="cannot load", code=3)
    with pytest.raises(UsageError, match=r"mine ended with code 3, .*: cannot load") as caught:
        LlamaBench("mine", [str(program.path)], gguf, 2).measure(CASES[0])
    assert f"{program.path} -m {gguf}" in str(caught.value.hint)
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(UsageError, match="mine cannot be started"):
        LlamaBench("mine", [str(tmp_path / "text")], gguf, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing", "does not say which program"),
        ("=/bin/true", "does not say which program"),
        ("mine=", "does not say which program"),
        ("mine='", "No closing quotation"),
        ("mine=none", "none is not there"),
        ("mine=.", "is no program that can be run"),
    ],
)
def test_programs_that_cannot_be(
    given: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is written, with the remedy."""
    monkeypatch.setattr(peers, "write_random_model", lambda *_, **__: pytest.fail("written"))
    assert main(["bench", "peers", "--peer", given]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert said in error
    assert hint.startswith("hint: ")


def test_a_checkpoint_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(tmp_path, depth=True, answer="[]")
    assert main(["bench", "peers", "demo", "--peer", f"mine={program.path}"]) == 2
    assert "--peer mine is given with demo" in capsys.readouterr().err


def test_it_stands_in_the_record(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row beside ours, without llama-cpp-python; the file has the shape's weights."""
    program = Program(tmp_path, depth=False, answer=json.dumps([ROW]))
    monkeypatch.setattr(peers, "read_spec", lambda *_: ("tiny", settings, 1024))
    monkeypatch.setattr(peers, "_installed", lambda module: module != "llama_cpp")
    record = peers.run(
        programs=[f"mine={program.path}"], vocabulary=64, plain_layers=0, repeat=2, threads=1
    )
    assert record["peers"] == {"mine": "build abc123 (7), no options"}
    assert [(row["peer"], row["name"]) for row in record["results"]] == [
        ("mine", case.name) for case in CASES
    ]
    assert all(row["theirs"]["samples_s"][0] in (3.2, 3.2 / 64) for row in record["results"])
    assert len(program.calls()) == 1 + 2 * len(CASES)
