"""Every command over bad input: exit code 2, one line that says what is wrong, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid.cli import main

#: What files are made of that hold something else than they should.
FILES = {
    "junk": b"\x93\x00\xff\xfe\x81" * 100,
    "junk.json": b"\x93\x00\xff\xfe\x81" * 100,
    "junk.toml": b"\x93\x00\xff\xfe\x81" * 100,
    "junk.npz": b"PK\x03\x04" + b"\x00" * 100,
    "empty": b"",
    "empty.json": b"",
    "null.json": b"null",
    "list.json": b"[1]",
    "digits.json": b'{"a": ' + b"9" * 6000 + b"}",
    "deep.json": b"[" * 100_000,
    "deep.toml": b"a = " + b"[" * 100_000,
    "parts.json": b'{"text_config": ' * 900 + b"1" + b"}" * 900,
    "plan.json": json.dumps({"schema": "hybrid.plan/1", "model": [], "fit": 3}).encode(),
}
#: What stands for a file or folder that is given; "." and "/" are folders of no model.
WRONG = ["{bad}/none", "{bad}/folder", "{bad}/broken", *(f"{{bad}}/{name}" for name in FILES)]
WRONG += ["", " ", "/", "~nobody-here/model", "x" * 5000, "ab\udcff/c", "{bad}/junk/inside"]
QUICK = ["-H", "rtx4060-laptop", "--tokens", "2"]
RUN = ["run", "{model}", "-p", "a", "-n", "1"]

#: Commands with a hole where a model goes.
OF_MODELS = [
    ["plan", "{}", *QUICK],
    ["run", "{}", "-p", "a"],
    ["chat", "{}"],
    ["convert", "{}", "{bad}/to"],
    ["calibrate", "{}"],
    *(["bench", name, "{}"] for name in ("model", "peers", "perplexity", "lookahead")),
    ["bench", "model", "--spec", "{}"],
    ["bench", "hybrid", "--model", "{}"],
]
#: And one where a file goes that is read.
OF_FILES = [
    ["plan", "{model}", "-H", "{}"],
    ["plan", "{model}", *QUICK, "--trace", "{}"],
    ["plan", "{model}", *QUICK, "--popularity", "{}"],
    ["plan", "--experiment", "{}"],
    ["plan", "diff", "{}", "{}"],
    ["bench", "hybrid", "--prompts", "4", "--trace", "{}"],
    ["bench", "planner", "--trace", "{}"],
]
#: And one where a file goes that is written.
WRITTEN = [
    ["plan", "{model}", *QUICK, "--html", "{}"],
    ["plan", "{model}", *QUICK, "--perfetto", "{}"],
    ["calibrate", "{model}", "--out", "{}"],
    [*RUN, "--vram", "700MiB", "--perfetto", "{}"],
    [*RUN, "--vram", "700MiB", "--routing", "{}"],
    [*RUN, "--vram", "700MiB", "--popularity", "{}"],
    *(
        ["bench", name, "--record", "{}"]
        for name in ("model", "peers", "perplexity", "lookahead", "kernels", "planner", "hybrid")
    ),
]
UNWRITABLE = ["{bad}/none/x", "{bad}/junk/x", "/proc/x", "x" * 5000, "{bad}/ab\udcff/x", ""]

NUMBERS = ["-1", "1e400", "nan", "inf", "", "x", "0x10", "-" + "1" * 40]
OF_NUMBERS = [
    *(["plan", "{model}", *QUICK, o, "{}"] for o in ("-t", "-c", "--prompt", "--batch", "--seed")),
    *([*RUN, o, "{}"] for o in ("-n", "-t", "-c", "--top-k", "--seed")),
    *([*RUN, o, "{}"] for o in ("--temperature", "--top-p", "--min-p", "--repeat-penalty")),
    *(["plan", "{model}", *QUICK, o, "{}"] for o in ("--vram", "--ram")),
    *([*RUN, o, "{}"] for o in ("--vram", "--ram")),
    *(["bench", "model", o, "{}"] for o in ("--prompt", "--generate", "--repeat", "--threads")),
    ["calibrate", "{model}", "--threads", "{}"],
    ["bench", "hybrid", "--prompts", "{}"],
    ["bench", "hybrid", "--resident", "{}"],
    ["bench", "perplexity", "--tokens", "{}"],
    ["bench", "lookahead", "--tokens", "{}"],
    ["bench", "planner", "--repeat", "{}"],
]
NAMES = ["", "x!", "ab\udcff", "q4_0,q9"]
OF_NAMES = [
    *(["plan", "{model}", *QUICK, o, "{}"] for o in ("--experts", "--dense", "--policy")),
    *([*RUN, o, "{}"] for o in ("--experts", "--dense", "--policy", "--device", "--dtype")),
    *(["convert", "{model}", "{bad}/to", o, "{}"] for o in ("--experts", "--dense")),
    *(["calibrate", "{model}", o, "{}"] for o in ("--experts", "--dense", "--device")),
    ["bench", "hybrid", "--device", "{}"],
    ["bench", "kernels", "--formats", "{}"],
    ["bench", "perplexity", "--formats", "{}"],
    ["bench", "{}"],
    ["chat", "{model}", "--when-full", "{}"],
    ["chat", "{model}", "--template-arg", "{}"],
    ["env", "{}"],
    ["{}"],
]
CASES = [
    *((words, WRONG) for words in OF_MODELS + OF_FILES),
    *((words, UNWRITABLE) for words in WRITTEN),
    (["convert", "{model}", "{}"], ["{bad}/junk/x", "/proc/x", "x" * 5000, ""]),
    *((words, NUMBERS) for words in OF_NUMBERS),
    *((words, NAMES) for words in OF_NAMES),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of damaged files, an empty folder, and one whose config.json is damaged."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_bytes(FILES["deep.json"])
    return folder


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a GPU and a folder to work in; whatever is measured fails the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        pytest.fail("it began")

    for begun in (
        "hybrid.measure.calibrate._run",
        "hybrid.bench.kernels.read_seconds",
        "hybrid.bench.model._measure",
        "hybrid.bench.planner._decisions",
        "hybrid.bench.peers.write_random_model",
        "hybrid.bench.perplexity.convert",
    ):
        monkeypatch.setattr(begun, fail)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "values"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_bad_input(
    words: list[str],
    values: list[str],
    bad: Path,
    tiny_model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each value ends in one line that begins with 'error:', and a hint after it."""
    for value in values:
        filled = [_filled(word, value, bad, tiny_model) for word in words]
        code = main(filled)
        told = capfd.readouterr().err
        assert code == 2, (filled, told)
        assert "Traceback" not in told
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (filled, told)
        assert len(errors[0]) < 6000


def _filled(word: str, value: str, bad: Path, model: Path) -> str:
    return word.replace("{}", value).replace("{bad}", str(bad)).replace("{model}", str(model))
