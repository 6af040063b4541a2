"""``hybrid plan`` given files and words it cannot use: one error each, naming thing and remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.ask.names import configs, find_hardware
from hybrid.errors import UsageError
from hybrid.machine.machines import Machine
from hybrid.planning.plan import plan
from planner_examples import LAPTOP, QUICK, SMALL, hybrid_plan, machine_table, save_config


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The directory of the small model's config.json."""
    return save_config(tmp_path / "small-moe")


def experiment_text() -> str:
    return (configs() / "experiments/hybrimoe-table3.toml").read_text("utf-8")


def test_the_experiment_stands_beside_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every published ratio is printed beside ours; one further than 20% off points to a note."""
    code, out, _ = hybrid_plan("--experiment", "hybrimoe-table3", "--json", capsys=capsys)
    assert code == 0
    data = json.loads(out)
    published = [(row["published_prefill"], row["published_decode"]) for row in data["rows"]]
    assert published[:5] == [(1.0, 1.0), (1.26, 1.46), (1.06, 1.15), (None, 1.38), (1.31, 1.86)]
    assert data["published_s"] == [1.47, 0.21]
    ours = [row["decode_speedup"] for row in data["what_if"]["rows"]]
    # The paper's order holds where its CPU's pace is supposed: every part helps, all help most.
    assert min(ours[1:]) > 1.0
    assert ours[4] == max(ours[:5])
    check_notes(data)
    path = tmp_path / "short.toml"
    path.write_text(experiment_text().replace("tokens = 64", "tokens = 2"))
    text = hybrid_plan("--experiment", str(path), capsys=capsys)[1]
    assert "see notes" in text
    assert "1.86" in text


def check_notes(data: dict[str, Any]) -> None:
    """Check that what the notes say of this table is what it shows.

    Every "ours against published", the seconds of both first rows, and the what-if's gains.
    """
    rows, other = data["rows"], data["what_if"]["rows"]
    shown = {
        (f"{row[f'{phase}_speedup']:.2f}", f"{row[f'published_{phase}']:.2f}")
        for row in (*rows, *other)
        for phase in ("prefill", "decode")
        if row[f"published_{phase}"]
    }
    notes = " ".join(data["notes"])
    told = re.findall(r"(\d\.\d\d) against (\d\.\d\d)(?! s)", notes)
    assert len(told) == 8
    assert set(told) <= shown
    first, then = ((row["prefill_s"], 1e3 * row["decode_s"]) for row in (rows[0], other[0]))
    assert "{:.2f} s against 1.47 s and {:.0f} ms against 210 ms".format(*first) in notes
    assert "first row takes {:.2f} s and {:.0f} ms".format(*then) in notes
    gains = (other[row]["decode_speedup"] for row in (1, 3, 4))
    assert "the gains are {:.2f}, {:.2f} and {:.2f}".format(*gains) in notes


def test_bad_experiments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown schedule, cache, field or file is named."""
    good = experiment_text()
    path = tmp_path / "x.toml"
    for old, new, words in (
        ('schedule = "exact"', 'schedule = "best"', "schedule is 'best'"),
        ('cache = "lru"', 'cache = "fifo"', "cache is 'fifo'"),
        ("capacity = 0.25", "capacity = 25", "capacity is 25"),
        ("capacity", "capcity", "unknown field 'capcity'"),
        ('hardware = "a6000-xeon5220r-10core"', 'hardware = "cpu-only-laptop"', "has no GPU"),
    ):
        path.write_text(good.replace(old, new, 1))
        code, _, err = hybrid_plan("--experiment", str(path), capsys=capsys)
        assert code == 2
        assert words in err
        assert "hint:" in err
    code, _, err = hybrid_plan("--experiment", "hybrimoe-table4", capsys=capsys)
    assert code == 2
    assert "hybrimoe-table3" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("Qwen3-31B", *LAPTOP), "unknown model 'Qwen3-31B'"),
        (("Mixtral", "-H", "rtx9999"), "unknown hardware 'rtx9999'"),
        (("Mixtral",), "--hardware is missing"),
        ((), "MODEL is missing"),
        (("none/config.json", *LAPTOP), "there is no file none/config.json"),
        (("Mixtral", "extra", *LAPTOP), "unexpected 'extra'"),
        (("Mixtral", *LAPTOP, "--ram", "0"), "--ram '0' is not above 0"),
        (("Mixtral", *LAPTOP, "--vram", "lots"), "--vram 'lots' is not a size"),
        (("Mixtral", "-H", "cpu-only", "--vram", "6GiB"), "has no gpu to change"),
        (("Mixtral", *LAPTOP, "--context", "99999"), "exceeds the 32768 tokens"),
        (("Mixtral", *LAPTOP, "--context", "0"), "context is 0, it must be a whole"),
        (("Mixtral", *LAPTOP, "--prompt", "5000"), "--prompt 5000 exceeds --context 4096"),
        (("Mixtral", *LAPTOP, "--batch", "-1"), "batch is -1, it must be a whole"),
        (("Mixtral", *LAPTOP, "--tokens", "9999999"), "exceeds 8192"),
        (("Mixtral", *LAPTOP, "--experts", "q5_9"), "--experts 'q5_9' is not a weight format"),
        (("Mixtral", *LAPTOP, "--threads", "4"), "threads is 4, but the rates of rtx4060-laptop"),
        (("Mixtral", *LAPTOP, "--vram", "100GiB"), "vram is 100.00 GiB, NVIDIA GeForce RTX 4060"),
        (("Mixtral", *LAPTOP, "--trace", "none.npz"), "there is no file none.npz"),
        (("--experiment", "none.toml"), "unknown experiment 'none.toml'"),
        (("Mixtral", *LAPTOP, "--json", "--markdown"), "--json and --markdown"),
        (("--experiment", "x", "-t", "4"), "--threads changes nothing of --experiment"),
        (("Mixtral", "--experiment", "x"), "MODEL changes nothing of --experiment"),
        (("--experiment", "x", "--html", "x.html"), "--html changes nothing of --experiment"),
        (("diff", "a", "b", "--json"), "--json changes nothing of diff"),
        (("diff", "a", "b", "--dense", "bf16"), "--dense changes nothing of diff"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, what is wrong with both values, a remedy, nothing on stdout, no traceback."""
    code, out, err = hybrid_plan(*words, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert problem in err
    assert "\nhint: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("context", value) for value in ("x", 2.5, True, 0)),
        *(("prompt", value) for value in ("x", 1.5, 0)),
        *(("tokens", value) for value in ("x", None, 0)),
        *(("batch", value) for value in (True, "2", None)),
        *(("seed", value) for value in ("x", -1, None)),
        ("hardware", 3),
        ("hardware", ["rtx4060-laptop"]),
        ("model", None),
        ("model", 3),
    ],
)
def test_values_of_the_wrong_kind(name: str, value: Any) -> None:
    """Python's callers get what the command line gets: an error with the value and a hint."""
    given: dict[str, Any] = {"model": "demo", "hardware": "rtx4060-laptop", name: value}
    with pytest.raises(UsageError, match=f"^{name} is ") as caught:
        plan(**given)
    assert repr(value) in caught.value.message
    assert caught.value.hint


def test_more_than_a_described_gpu_has_is_refused() -> None:
    """However it is described; a nominal size is all of it, and an emulated GPU has any size."""
    whole = int(7.9 * 2**30)
    card = find_hardware("rtx4060-laptop").with_values("gpu", vram_bytes=whole)
    for described in (card, Machine(card)):
        assert plan("demo", described, vram="8GiB", tokens=1).fit.vram_bytes == whole
        with pytest.raises(UsageError, match=r"vram is 9\.00 GiB, NVIDIA .* has 7\.90 GiB"):
            plan("demo", described, vram="9GiB", tokens=1)
    emulated = plan("demo", Machine(card, emulated=True), vram="9GiB", tokens=1)
    assert emulated.fit.vram_bytes == 9 * 2**30


def test_numbers_of_numpy_are_whole() -> None:
    """Whatever is a whole number is taken as one."""
    given: dict[str, Any] = {"context": np.int64(64), "tokens": np.int32(1)}
    found = plan("demo", "rtx4060-laptop", **given)
    assert (found.request.context, found.request.tokens) == (64, 1)
    assert type(found.request.context) is int


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_experts": None}, "has num_experts_per_tok, and none of"),
        ({"num_experts": 10**14}, "num_experts is 1e+14"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1"),
    ],
)
def test_bad_config_json(
    small: Path, change: dict[str, Any], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.json that is not MoE, lacks a field or has an absurd value is refused by name."""
    (small / "config.json").write_text(json.dumps({**SMALL, **change}))
    code, _, err = hybrid_plan(str(small), *LAPTOP, capsys=capsys)
    assert code == 2
    assert problem in err
    (small / "config.json").write_text(json.dumps(SMALL)[:-20])
    code, _, err = hybrid_plan(str(small), *LAPTOP, capsys=capsys)
    assert code == 2
    assert "cut short" in err


@pytest.mark.parametrize("content", [b"root:x:0:0:root:/root:/bin/bash\n", b"\x89PNG\xff\xfe"])
def test_any_other_file(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no description is told as that, not as a parser's or a decoder's complaint."""
    path = tmp_path / "passwd"
    path.write_bytes(content)
    for words, what in (
        ((str(path), *LAPTOP), "model description"),
        (("Mixtral", "-H", str(path)), "hardware description"),
        (("--experiment", str(path)), "experiment"),
    ):
        code, out, err = hybrid_plan(*words, capsys=capsys)
        assert (code, out) == (2, "")
        error, hint = err.splitlines()
        assert error == f"error: {path} is no {what}"
        assert ".toml" in hint


def test_hints_are_about_the_file_that_lacks_something(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hardware file or an experiment is never told to be like a model's config.json."""
    machine, experiment = tmp_path / "mine.toml", tmp_path / "x.toml"
    for words, path, text, hint in (
        ((str(small), "-H"), machine, toml(machine_table(cpu=None)), "configs/hardware"),
        (("--experiment",), experiment, "name = 'x'", "configs/experiments"),
    ):
        path.write_text(text)
        code, _, err = hybrid_plan(*words, str(path), capsys=capsys)
        assert code == 2
        assert "lacks" in err
        assert hint in err.splitlines()[1]
        assert "config.json" not in err


def test_own_hardware_file(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A TOML of the user's machine works; a wrong unit or type in it is named."""
    path = tmp_path / "mine.toml"
    path.write_text(toml(machine_table()))
    code, out, _ = hybrid_plan(str(small), "-H", str(path), *QUICK, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["hardware"]["name"] == "round"
    path.write_text(toml(machine_table()).replace("ram_bytes", "ram_gb"))
    code, _, err = hybrid_plan(str(small), "-H", str(path), capsys=capsys)
    assert code == 2
    assert "unknown field" in err
    path.write_text(toml(machine_table()).replace("100000000000.0", "'100 GB/s'", 1))
    code, _, err = hybrid_plan(str(small), "-H", str(path), capsys=capsys)
    assert code == 2
    assert "write a plain number in SI units" in err


def toml(table: dict[str, Any]) -> str:
    """A machine's table as TOML."""
    lines = [f"name = '{table['name']}'"]
    for part, values in table.items():
        if isinstance(values, dict):
            lines.append(f"[{part}]")
            for name, value in values.items():
                if isinstance(value, dict):
                    inner = ", ".join(f"{k} = {v!r}" for k, v in value.items())
                    value = f"{{ {inner} }}"
                else:
                    value = repr(value)
                lines.append(f"{name} = {value}")
    return "\n".join(lines)


def test_a_trace_of_another_model(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recorded trace is replayed; one of another model or cut short is refused."""
    ids = np.argsort(np.random.default_rng(0).random((24, 6, 16)), axis=-1)[..., :4]
    path = tmp_path / "t.npz"
    np.savez(path, expert_ids=ids.astype(np.uint8), routing_weights=ids / 100)
    words = (str(small), *LAPTOP, *QUICK, "--trace", str(path))
    code, out, _ = hybrid_plan(*words, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["routing"] == {"source": "measured", "origin": "trace t.npz"}
    code, _, err = hybrid_plan("Mixtral", *words[1:], capsys=capsys)
    assert code == 2
    assert "has 6 MoE layers, Mixtral-8x7B has 32" in err
    path.write_bytes(path.read_bytes()[:-50])
    code, _, err = hybrid_plan(*words, capsys=capsys)
    assert code == 2
    assert "cannot be read as a routing trace" in err
