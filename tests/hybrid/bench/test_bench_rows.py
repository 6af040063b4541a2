"""What a benchmark keeps of a run that is interrupted, and how a record grows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.bench import hybrid, kernels, lookahead, model, perplexity, planner
from hybrid.bench.record import Line
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.measure import reads
from small_bench import read_little

ROOT = Path(__file__).parents[3]


def interrupted_at(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, but its call number ``count`` is the moment of Ctrl-C."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KeyboardInterrupt
        return real(*args, **options)

    return call


def cut(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark that is interrupted; return its record and what it said.

    It is the file's only line beside the one that was there, is marked, and is spoken of.
    """
    file.write_text('{"there": 1}\n')
    assert main(["bench", *words, "--record", str(file)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    there, line = file.read_text().splitlines()
    assert there == '{"there": 1}'
    record: dict[str, Any] = json.loads(line)
    assert record["complete"] is False
    assert record["command"] == f"hybrid bench {words[0]}"
    assert f'kept in {file} as a line with "complete": false' in err.splitlines()[-1]
    return record, err


def test_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case is kept while the next one is prepared."""
    case = kernels.Case("q4_0", 64, 32, 8, 2, 1)
    monkeypatch.setattr(reads, "ROTATION_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "cases", lambda fs: [case._replace(format=f) for f in fs])
    monkeypatch.setattr(kernels, "fill", interrupted_at(2, kernels.fill))
    record, err = cut(capsys, tmp_path / "a.jsonl", "kernels", "--repeat", "3")
    (row,) = record["results"]
    assert row["format"] == "q4_0"
    assert f"64 x 32 q4_0, 1 tokens: {row['seconds_median'] * 1e3:.2f} ms" in err
    assert "interrupted after 1 finished row, kept" in err


def test_model(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Repeats are kept: of one to warm up and two a repeat, the sixth generation is cut."""
    read_little(monkeypatch)
    monkeypatch.setattr(model, "generate_once", interrupted_at(6, model.generate_once))
    words = ("model", str(tiny_model), "--prompt", "4", "--generate", "3")
    record, err = cut(capsys, tmp_path / "a.jsonl", *words)
    assert len(record["prefill"]["samples_s"]) == len(record["decode"]["samples_s"]) == 2
    assert f"decode {1 / record['decode']['samples_s'][1]:.1f} tokens/s" in err
    assert "interrupted after 2 finished rows, kept" in err


def test_lookahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows are kept; the one that is cut off counts for nothing."""
    real = lookahead.Comparison.experts
    layers = len(lookahead.HybridModel.from_pretrained(threads=1).model.model.layers)
    monkeypatch.setattr(lookahead.Comparison, "experts", interrupted_at(2 * layers + 2, real))
    record, err = cut(capsys, tmp_path / "a.jsonl", "lookahead", "--tokens", "2048")
    assert record["tokens"] == 1024
    assert f"window 2 of 4: {record['recall']['1']:.1%} of the next layer's" in err
    assert "interrupted after 2 finished rows, kept" in err


def test_perplexity(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A format is kept while the next one is measured; of that, nothing."""
    monkeypatch.setattr(perplexity, "predict", interrupted_at(4, perplexity.predict))
    (tmp_path / "text").write_text("a text " * 200)
    words = ("perplexity", str(tiny_model), "--file", str(tmp_path / "text"), "--tokens", "1024")
    record, err = cut(capsys, tmp_path / "a.jsonl", *words, "--decode", "0")
    (row,) = record["results"]
    assert (row["experts"], row["phase"], row["tokens"]) == ("f32", "prefill", 2 * 511)
    assert f"f32, prefill: perplexity {row['perplexity']:.3f}, 1.0000 of" in err
    assert "interrupted after 1 finished row, kept" in err


def test_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part that was measured is kept."""
    monkeypatch.setattr(planner, "_gaps", interrupted_at(1, planner._gaps))
    record, err = cut(capsys, tmp_path / "a.jsonl", "planner", "--repeat", "3")
    assert [len(record[part]) for part in ("decisions", "steps", "gaps", "caches")] == [4, 2, 0, 0]
    assert "prefill, unequal loads, 128 experts, 4096 tokens: " in err
    assert "interrupted after 6 finished rows, kept" in err


def test_sharing(
    shared_spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All rules of a case are kept, and compared, while the next case is measured."""
    monkeypatch.setattr(hybrid, "_compare", interrupted_at(2, hybrid._compare))
    words = ("--model", str(shared_spec), "--prompts", "4", "--generate", "3", "--repeat", "1")
    record, err = cut(capsys, tmp_path / "a.jsonl", "hybrid", *words, "--resident", "0.5,0.75")
    rules = [rule.name for rule in hybrid.RULES]
    assert [row["rule"] for row in record["results"]] == rules
    assert [row["rule"] for row in record["summary"]] == [*rules, hybrid.BOUND]
    assert all(f"4 tokens, 50% resident, {rule}: prefill " in err for rule in rules)
    assert f"interrupted after {len(rules)} finished rows, kept" in err


def test_without_a_record_the_rows_are_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said row by row is all there is, and how to keep it."""
    monkeypatch.setattr(planner, "_gaps", interrupted_at(1, planner._gaps))
    assert main(["bench", "planner", "--repeat", "3"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "interrupted after 6 finished rows, see above; --record FILE keeps them in a file"
    )
    monkeypatch.setattr(planner, "_decisions", interrupted_at(1, planner._decisions))
    assert main(["bench", "planner", "--repeat", "3"]) == 130
    assert "interrupted" not in capsys.readouterr().err, "there is nothing to speak of"


SHAPE = """
name = "Tiny"
[config]
model_type = "qwen3_moe"
hidden_size = 64
intermediate_size = 96
moe_intermediate_size = 32
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
num_hidden_layers = 5
num_experts = 4
num_experts_per_tok = 2
vocab_size = 96
max_position_embeddings = 1024
"""
#: Stands in llama.cpp's place, and never comes to the end of a long prompt.
LLAMA = """
import sys, time
class Llama:
    def __init__(self, path, **options):
        self.n_tokens = 0
    def n_vocab(self):
        return 96
    def reset(self):
        pass
    def eval(self, ids):
        if len(ids) == 512:
            print("a long prompt", file=sys.stderr, flush=True)
            time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_peers(tmp_path: Path) -> None:
    """Ctrl-C at a terminal, which all processes there get, while llama.cpp computes.

    The finished row is in the record, and neither process shows a traceback.
    """
    (tmp_path / "tiny.toml").write_text(SHAPE)
    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    file = tmp_path / "a.jsonl"
    words = [
        "bench",
        "peers",
        "--spec",
        "tiny.toml",
        "--layers",
        "2",
        "--vocabulary",
        "96",
        "--repeat",
        "2",
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "hybrid", *words, "--record", str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line == "a long prompt\n":
                break
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(said) + err
    assert out == ""
    assert "Traceback" not in err
    record = json.loads(file.read_text())
    (row,) = record["results"]
    assert (row["name"], row["peer"], record["spec"]) == ("decode", "llama.cpp", "Tiny")
    assert record["complete"] is False
    assert record["decode_path"].startswith("one-token kernels")
    assert record["dtype"] in ("float32", "bfloat16")
    assert any(line.startswith("decode, llama.cpp: ours ") for line in said)
    assert err.splitlines()[-1].startswith("interrupted after 1 finished row, kept in ")


def test_a_line_grows_in_its_place(tmp_path: Path) -> None:
    """A version takes the last one's place; what others put into the file stays where it is."""
    file, link = tmp_path / "a.jsonl", tmp_path / "link.jsonl"
    file.write_text('{"first": 1}\n')
    link.symlink_to(file)
    line = Line(link)
    line.put({"rows": [1]})
    with file.open("a") as other:
        other.write('{"other": 1}\n')
    line.put({"rows": [1, 2]})
    assert file.read_text() == '{"first": 1}\n{"rows": [1, 2]}\n{"other": 1}\n'
    file.write_text('{"first": 1}\n')  # somebody has taken it out
    line.put({"rows": [1, 2, 3]})
    assert file.read_text() == '{"first": 1}\n{"rows": [1, 2, 3]}\n'
    assert link.is_symlink()


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that cannot be written whole leaves no half line behind, nor any other file."""
    file = tmp_path / "results.jsonl"
    line = Line(file)
    line.put({"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybrid.paths.os.fsync", full)
    with pytest.raises(UsageError, match="No space"):
        line.put({"a": 1, "b": 2})
    assert file.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [file]
