"""The command line from outside: what it prints where, what it refuses, what it imports."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hybrid
from cpu_experts.jit import hostcpu, simd_level
from hybrid.cli import generation, main
from hybrid.cli.app import COMMANDS
from hybrid.cli.options import Sampling, sampling_options
from hybrid.errors import UsageError
from hybrid.machine import host
from hybrid.session.model import HybridModel
from hybrid.weights.cache import converted_copy
from tiny_model import CONTEXT

HEAVY = {"torch", "numba", "transformers", "scipy", "pandas"}


@pytest.fixture(scope="module")
def converted(tiny_model: Path) -> Path:
    """The tiny model, its converted copy in the cache already."""
    converted_copy(tiny_model, "q4_0", None)
    return tiny_model


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has after ``code``."""
    show = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def run_main(code: str) -> str:
    return f"from hybrid.cli import main; assert main({code}) == 0"


@pytest.mark.parametrize(
    "code",
    ["import hybrid", "import planner", run_main("['--help']"), run_main("['--version']")]
    + [
        run_main(f"[{command!r}, '--help']")
        for command in ("run", "chat", "plan", "env", "bench", "calibrate")
    ]
    + [run_main("['env', '--json']")],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    """Help, version and env start at once: no torch, numba or transformers in the process."""
    assert not modules_after(code) & HEAVY


def test_commands_are_imported_when_they_run() -> None:
    """The list of commands comes without any command's module."""
    code = (
        "import sys; from hybrid.cli import main; main(['--help']); "
        "loaded = {m for m in sys.modules if m.startswith('hybrid.cli.')}; "
        "assert loaded == {'hybrid.cli.app', 'hybrid.cli.exit_codes', 'hybrid.cli.text'}, loaded"
    )
    modules_after(code)


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that is listed can be loaded and explains itself."""
    for name, mount in COMMANDS.items():
        assert main([name, "--help"]) == 0
        assert f"hybrid {name}" in capsys.readouterr().out
        main(["--help"])
        assert mount.summary in " ".join(capsys.readouterr().out.split())


def test_no_arguments_show_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hybrid`` alone is ``hybrid --help``."""
    monkeypatch.setattr(sys, "argv", ["hybrid"])
    assert main() == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the package's version and nothing else."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybrid {hybrid.__version__}\n"


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must end in exit code 2, one line and a hint; return the line."""
    assert main(list(args)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("compiling the kernels")]
    assert out == ""
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["rnu"], "'run'"),
        (["--colour"], "--colour"),
        (["run", "--colour"], "--colour"),
        (["bench"], "Missing command"),
        (["convert"], "src"),
        (["run", "-n", "0"], "--max-new-tokens"),
        (["run", "-n", "many"], "--max-new-tokens"),
        (["run", "--top-p", "2"], "--top-p"),
        (["run", "--seed", str(2**64)], "--seed"),
        (["run", "-p", "a", "-f", "b"], "--prompt and --file"),
        (["run", "-f", "/no/such/file"], "/no/such/file"),
        (["run", "/no/such/model", "-p", "a"], "/no/such/model"),
        (["chat", "/no/such/model"], "/no/such/model"),
        (["run", "-p", "a", "--greedy", "--top-k", "3"], "greedy"),
        (["run", "-p", "a", "--temperature", "0", "--min-p", "0.1"], "greedy"),
        (["run", "-p", "a", "--experts", "q5_x"], "q5_x"),
        (["run", "-p", "a", "-t", "100000"], "100000"),
        (["chat", "--chat-template", "/no/such/file"], "/no/such/file"),
        (["bench", "kernels", "--threads", "100000"], "100000"),
        (["bench", "kernels", "--tokens", "1,many"], "1,many"),
        (["bench", "kernels", "--tokens", "7"], "7"),
        (["bench", "kernels", "--formats", "q5_x"], "q5_x"),
        (["bench", "kernels", "--record", "/no/such/folder/a.jsonl"], "/no/such/folder"),
    ],
)
def test_user_errors(capsys: pytest.CaptureFixture[str], args: list[str], names: str) -> None:
    """Exit code 2, one line that names the thing, one hint, no traceback, nothing on stdout."""
    assert names in refused(capsys, *args)


def test_prompts_that_cannot_be_continued(
    capsys: pytest.CaptureFixture[str], converted: Path
) -> None:
    """0 tokens, and more tokens than the context: the numbers are in the message."""
    assert "0 tokens" in refused(capsys, "run", str(converted), "-p", "")
    line = refused(capsys, "run", str(converted), "-p", "x" * (CONTEXT + 7))
    assert str(CONTEXT + 7) in line
    assert f" {CONTEXT}," in line


class Stdin(io.TextIOWrapper):
    """Piped bytes; a terminal when ``terminal`` is set."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    stdin = Stdin(io.BytesIO(data), encoding="utf-8")
    stdin.terminal = terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def test_text_that_is_not_utf8(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first wrong byte and its offset are named: of stdin, of a file, of an argument."""
    pipe(monkeypatch, b"def \xff")
    assert "stdin is not valid UTF-8: byte 0xff at offset 4" in refused(capsys, "run")
    file = tmp_path / "latin1.txt"
    file.write_bytes("aé".encode("latin-1"))
    assert "latin1.txt is not valid UTF-8: byte 0xe9 at offset 1" in refused(
        capsys, "run", "-f", str(file)
    )
    assert "offset 2" in refused(capsys, "run", "-p", os.fsdecode(b"ab\xff"))


def test_a_terminal_is_not_a_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a prompt at a terminal the program says so; it does not wait in silence."""
    pipe(monkeypatch, b"", terminal=True)
    assert "there is no prompt" in refused(capsys, "run")


def test_run_writes_the_text_and_nothing_else_to_stdout(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    converted: Path,
) -> None:
    """From -p, a file and stdin alike; figures go to stderr; --echo puts the prompt before."""
    text = HybridModel.from_pretrained(converted).generate(
        "é f", max_new_tokens=20, do_sample=False
    )
    file = tmp_path / "prompt.txt"
    file.write_bytes("é f\n".encode())
    command = ["run", str(converted), "-n", "20", "-t", "1", "--greedy"]
    for more, expected in (
        (["-p", "é f"], text),
        (["-f", str(file)], text),
        (["-f", "-"], text),
        ([], text),
        (["--echo"], "é f" + text),
    ):
        pipe(monkeypatch, "é f\n".encode())
        assert main([*command, *more]) == 0
        out, err = capsys.readouterr()
        assert out == expected
        for word in ("prompt 4 tokens", "TTFT", "decode 20 tokens", "tokens/s", "peak memory"):
            assert word in err


def test_ctrl_c_before_the_model_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, converted: Path
) -> None:
    """An interruption while the prompt is encoded ends the program without figures or traceback."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HybridModel, "encode", interrupt)
    assert main(["run", str(converted), "-p", "a", "-t", "1"]) == 130
    assert "tokens/s" not in capsys.readouterr().err


def test_run_ends_with_a_report_on_request(
    capsys: pytest.CaptureFixture[str], converted: Path
) -> None:
    """--report says format, SIMD level, threads and every figure with its source."""
    assert main(["run", str(converted), "-p", "a", "-n", "3", "-t", "1", "--report"]) == 0
    err = capsys.readouterr().err
    for word in ("q4_0", "SIMD level", "1 (torch and kernels)", "(measured)", "max_new_tokens"):
        assert word in err


def test_seed_and_stop(capsys: pytest.CaptureFixture[str], converted: Path) -> None:
    """The same seed gives the same text, another one another; --stop cuts it."""
    command = ["run", str(converted), "-p", "a", "-n", "30", "-t", "1", "--temperature", "1.5"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    stop = next(char for char in texts[0][3:] if char.isascii() and char.isprintable())
    assert main([*command, "--seed", "1", "--stop", stop]) == 0
    assert capsys.readouterr().out == texts[0][: texts[0].index(stop)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"greedy": True}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        ({"seed": 0}, {"do_sample": True}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"greedy": True, "seed": 1}, {"do_sample": False}),
    ],
)
def test_sampling_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """The command line's options in transformers' words; none leave the choice to the model."""
    assert sampling_options(**given) == Sampling(expected, given.get("seed"))


def test_greedy_with_sampling_is_refused() -> None:
    """Options that contradict each other are not settled silently."""
    with pytest.raises(UsageError):
        sampling_options(greedy=True, temperature=0.5)


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors a user can act on are shortened; a bug stays visible."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generation, "load", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", "-p", "a"])


def test_env_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, the SIMD level among those that can run, threads, memory, paths."""
    assert main(["env", "--json"]) == 0
    environment = json.loads(capsys.readouterr().out)
    assert environment["versions"]["hybrid"] == hybrid.__version__
    assert environment["versions"]["torch"][0].isdigit()
    emulated = simd_level.EMULATED * hostcpu.EMULATED
    level = environment["cpu"]["simd_level"].removesuffix(emulated)
    assert level == simd_level.LEVEL
    assert emulated or level in environment["cpu"]["simd_levels"]
    assert environment["cpu"]["bf16_units"] == sorted(hostcpu.processor().units)
    assert environment["cpu"]["simd_levels"][-1] == "portable"
    assert environment["threads"] == host.default_threads() >= 1
    assert environment["memory"]["total"] > environment["memory"]["available"] > 0
    assert environment["paths"]["cache"] == os.environ["HYBRID_CACHE"]
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", environment["cpu"]["name"], "SIMD level", "threads", "memory", "GPU"):
        assert word in text


def test_env_obeys_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forced level, hidden units and thread count are shown; an unknown level is told, too."""
    monkeypatch.setattr(hostcpu, "host_features", lambda: frozenset({"amx-bf16"}))
    monkeypatch.setenv("HYBRID_SIMD", "portable")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "portable (set by HYBRID_SIMD)" in text
    assert "bfloat16 units     none (set by HYBRID_SIMD; this processor has amx)" in text
    assert re.search(r"^threads +3$", text, re.MULTILINE)
    for words, code in ((["env"], 0), (["env", "--check"], 1)):
        monkeypatch.setenv("HYBRID_SIMD", "sse9")
        assert main(words) == code
        row = "HYBRID_SIMD      HYBRID_SIMD='sse9': 'sse9' is no SIMD level, so nothing runs; write"
        assert row in capsys.readouterr().out


def test_gpus_are_read_from_nvidia_smi() -> None:
    """Names with commas, sizes in MiB, and a card that does not tell its memory."""
    rows = "NVIDIA H200, 143771, 570.86\n\nOdd, Name, [N/A], 1.2\n"
    assert host.parse_nvidia_smi(rows) == [
        host.Gpu("NVIDIA H200", 143771 << 20, "570.86"),
        host.Gpu("Odd, Name", None, "1.2"),
    ]


def test_the_demo_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Without MODEL, and as ``demo``, the shipped model writes; the API's default is the same."""
    text = HybridModel.from_pretrained(threads=1).generate(
        "import ", max_new_tokens=8, do_sample=False
    )
    for model in ([], ["demo"]):
        assert main(["run", *model, "-p", "import ", "-n", "8", "--greedy", "-t", "1"]) == 0
        assert capsys.readouterr().out == text
