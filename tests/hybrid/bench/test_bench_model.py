"""``hybrid bench model`` on small shapes: what is written loads, and the record is complete."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hybrid.ask.asked_model import find_model
from hybrid.bench.model import _start, generate_once, read_spec, run
from hybrid.cli.bench import bench_app
from hybrid.errors import DiskSpaceError, UsageError
from hybrid.loading import load_fast_model
from hybrid.loop.loop import Loop
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.measure.alone import Passes, generate
from hybrid.measure.random_model import check_room
from hybrid.measure.terms_of_step import Pass
from hybrid.weights.store import ExpertStore
from planner.cost.step_times import StepTimes
from planner.describe.hardware import Point, TermPoint
from planner.describe.terms import CALL, CPU, HEAD, MIXER
from planner.errors import PlannerError
from planner_examples import bare_machine
from small_bench import STARTED, read_little, write_spec


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_spec(tmp_path, head_dim=16, num_hidden_layers=5, num_experts=4, vocab_size=96)


def test_a_fresh_process_is_timed(tiny_model: Path) -> None:
    """Its steps follow each other, and its memory is that of torch at least."""
    found = _start(str(tiny_model), "auto", threads=1, prompt=4, generate=3)
    assert found.keys() == STARTED.keys()
    assert 0 < found["load_s"] < found["load_to_first_token_s"]
    together = found["import_s"] + found["load_to_first_token_s"]
    assert together == pytest.approx(found["process_to_first_token_s"])
    assert 1 << 25 < found["anonymous_before_loading_bytes"] <= found["peak_anonymous_bytes"]


def test_random_weights_of_a_described_shape(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five layers, on the fast path; bytes a token are those of the shape."""
    read_little(monkeypatch)
    result = run(spec=spec, layers=2, prompt=8, generate=4, repeat=3)
    assert result["family"] == "Qwen3MoeForCausalLM"
    assert result["layers"] == 2
    assert result["decode_path"].startswith("one-token kernels")
    per_layer = (64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 32) * 18 // 32
    # The router's 4 rows are padded to 16 and stay bfloat16; keys and values are half precision.
    per_layer += 16 * 64 * 2 + 2 * 2 * 2 * 16 * 10
    assert result["bytes_per_token"] == 2 * per_layer + 96 * 64 * 18 // 32
    assert len(result["decode"]["samples_s"]) == len(result["prefill"]["samples_s"]) == 3
    assert 0 < result["read_fraction"] <= 1
    assert 0 <= result["disturbed"] <= 1
    assert result["predicted"] is None
    assert result["peak_memory_bytes"] > 0
    json.dumps(result)


def test_tokens_that_read_faster_raise_the_bandwidth(
    spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plain reads are slow, what a token reads is all of the bandwidth and not more."""
    read_little(monkeypatch)
    monkeypatch.setattr("hybrid.bench.model.read_seconds", lambda words, threads: 60.0)
    result = run(spec=spec, layers=2, prompt=8, generate=4, repeat=3)
    assert result["read_fraction"] == 1.0
    rate = result["bytes_per_token"] * result["decode"]["tokens_per_s"]
    assert result["read_bandwidth_bytes_per_s"] == pytest.approx(rate)


def test_a_written_store_is_whole(spec: Path, tmp_path: Path) -> None:
    """Every checksum of the written experts holds."""
    from hybrid.measure.random_model import write_random_model

    folder = tmp_path / "model"
    folder.mkdir()
    write_random_model(read_spec(spec, 1)[1], folder, experts="q8_0", dense=None)
    ExpertStore.open(folder, verify=True)


def test_the_command_prints_one_json_object(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory instead of a description; talk goes to stderr."""
    read_little(monkeypatch)
    monkeypatch.setattr("hybrid.bench.model.Others", lambda: SimpleNamespace(lap=lambda: 0.25))
    options = ["--prompt", "4", "--generate", "3", "--repeat", "1"]
    done = CliRunner().invoke(bench_app, ["model", str(tiny_model), "--json", *options])
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["generated_tokens"] == 3
    assert "run 1 of 1" in done.stderr
    done = CliRunner().invoke(bench_app, ["model", str(tiny_model), *options])
    assert "decode" in done.stdout
    assert "of the bandwidth" in done.stdout
    assert "first token after 1.50 s (4.50 s with 3.00 s of imports)" in done.stdout
    assert "anonymous       300 MiB at most" in done.stdout
    assert "hybrid calibrate" in done.stdout
    assert re.search(r"^computed in +(float32|bfloat16)$", done.stdout, re.M)
    assert "disturbed       other programs used 25% of the processors" in done.stdout


def test_a_full_disk_is_told_before_anything_is_written(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed and what is free, and where to turn."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        DiskSpaceError, match=r"1\.0 KiB free, the model takes [\d.]+ [KMG]iB"
    ) as caught:
        check_room(read_spec(spec, 1)[1], tmp_path, "q4_0", None)
    assert "TMPDIR" in str(caught.value.hint)


def test_bad_descriptions_are_refused(tmp_path: Path) -> None:
    """No file, no table, an unknown name, and both of the two sources."""
    with pytest.raises(UsageError, match=r"there is no file .*none\.toml"):
        read_spec(tmp_path / "none.toml", None)
    (tmp_path / "bad.toml").write_text("name = 3")
    with pytest.raises(PlannerError, match="lacks num_hidden_layers"):
        read_spec(tmp_path / "bad.toml", None)
    with pytest.raises(UsageError, match="unknown model 'nosuch'"):
        read_spec("nosuch", None)
    with pytest.raises(UsageError, match="either a model directory or --spec"):
        run("demo", spec="qwen3-30b-a3b")


def test_a_shape_has_the_names_that_plans_know() -> None:
    """A shipped name, however it is written, is the file of that name."""
    shipped = Path(__file__).parents[3] / "configs" / "models" / "qwen3-30b-a3b.toml"
    name, settings, context = read_spec(shipped, 5)
    assert name == "Qwen3-30B-A3B"
    assert settings["num_hidden_layers"] == 5
    for given in ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3-30b"):
        assert read_spec(given, 5) == (name, settings, context)
    assert "quantization_config" not in read_spec("demo", None)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_computed_in(tiny_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As asked for, here and in the fresh process, and recorded; nothing else is taken."""
    read_little(monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr("hybrid.bench.model._start", lambda *of: asked.append(of[1]) or STARTED)
    result = run(str(tiny_model), dtype=dtype, prompt=4, generate=3, repeat=1, threads=1)
    assert result["dtype"] == dtype
    assert asked == [dtype]
    with pytest.raises(UsageError, match="unknown dtype to compute in: 'float64'"):
        run(str(tiny_model), dtype="float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_calibration_is_of_another_type(
    tiny_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this processor computes a model in by itself is measured first, anything else not."""
    read_little(monkeypatch)
    asked: list[Path] = []
    monkeypatch.setattr("hybrid.bench.model._calibrate", lambda *of: asked.append(of[0]))
    monkeypatch.setattr("hybrid.bench.model._start", lambda *of: STARTED)
    monkeypatch.setattr("hybrid.bench.model.automatic_dtype", lambda model: dtype)
    short = {"prompt": 4, "generate": 3, "repeat": 1, "threads": 1, "calibrate": True}
    for given in ("auto", "float32", "bfloat16"):
        asked.clear()
        run(str(tiny_model), dtype=given, **short)
        assert asked == ([tiny_model] if given in ("auto", dtype) else [])


def test_the_demo_is_measured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model or a shape, what ships with the program."""
    read_little(monkeypatch)
    result = run(prompt=4, generate=3, repeat=1, threads=1)
    assert result["family"] == "Qwen3MoeForCausalLM"
    assert "spec" not in result


def test_a_calibrated_machine_predicts_the_bench(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions stand beside what was measured, made with the loads that the router chose; so do
    their terms, each with its residual, and the calibration that they come from."""
    read_little(monkeypatch)
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    options = ["--prompt", "4", "--generate", "3", "--repeat", "1", "--threads", "1"]
    done = CliRunner().invoke(bench_app, ["model", str(tiny_model), "--json", *options])
    result = json.loads(done.stdout)
    found = result["predicted"]
    assert sum(found["prompt_terms_s"].values()) == pytest.approx(found["ttft_s"])
    assert sum(found["token_terms_s"].values()) == pytest.approx(found["tpot_s"])
    ratio = found["tpot_s"] / result["decode"]["seconds_median"]
    assert result["residuals"]["tpot"] == pytest.approx(ratio - 1)
    terms = {(term["phase"], term["name"]): term for term in result["terms"]}
    for phase in ("prefill", "decode"):
        for name in (MIXER, HEAD, CALL):  # experts as tiny as these may be lost in noise
            term = terms[phase, name]
            assert term["measured_s"] > 0
            assert term["residual"] == pytest.approx(term["predicted_s"] / term["measured_s"] - 1)
    assert terms["prefill", CPU]["predicted_s"] == found["prompt_terms_s"][CPU]
    about = result["calibration"]
    assert about["from"].startswith("rates of this machine for its experts and attention")
    assert about["machine"] == bare_machine().summary
    done = CliRunner().invoke(bench_app, ["model", str(tiny_model), *options])
    assert "against measured)" in done.stdout
    assert "from rates of this machine for its experts" in done.stdout
    assert re.search(r"^read bandwidth .*, 10\.0 GB/s when calibrated", done.stdout, re.M)
    assert re.search(rf"^decode +{HEAD}: predicted .* measured .*\(predicted", done.stdout, re.M)
    assert re.search(r"^decode is off +most by", done.stdout, re.M), "the machine is made up"


def test_the_shape_and_formats_are_calibrated_first(
    spec: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process of its own and once, again where it was disturbed; or not, if so asked."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr("hybrid.bench.model._measure", lambda *of: {})
    asked: list[list[str]] = []

    def calibrate(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command[2:])
        return SimpleNamespace(returncode=code)

    code = 0
    monkeypatch.setattr("subprocess.run", calibrate)
    run(spec=spec, dense="q8_0", threads=1)
    (words,) = asked
    assert words[:2] == ["hybrid", "calibrate"]
    assert words[3:] == [
        *("--device", "cpu", "--threads", "1", "--experts", "q4_0", "--dense", "q8_0")
    ]
    run(spec=spec, dense="q8_0", threads=1, calibrate=False)
    assert len(asked) == 1
    run(str(tiny_model), threads=1)
    assert asked.pop()[2] == str(tiny_model)
    wanted = find_model(tiny_model)
    shape = wanted.spec.experts
    about = {"family": wanted.spec.family, "format": wanted.dense, "tokens": 1, "context": 1}
    params = wanted.spec.layers[0].mixer.params
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate, "format": "q4_0"}
    known = replace(
        bare_machine(),
        points=(Point(lane="cpu", load=1, seconds=1.0, **sizes),),
        terms=(TermPoint(term=MIXER, params=params, seconds=1.0, **about),),
    )
    calibrations.save(known, Identity.of_this_machine(1))
    run(str(tiny_model), threads=1)
    assert len(asked) == 1, "it is known"
    disturbed = replace(known, points=(replace(known.points[0], disturbed=0.3),))
    calibrations.save(disturbed, Identity.of_this_machine(1))
    code = 2
    with pytest.raises(UsageError, match="could not be calibrated") as caught:
        run(str(tiny_model), threads=1)
    assert "--no-calibrate" in str(caught.value.hint)


def test_generations_take_the_loop_that_sessions_take(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In benchmarks and calibrations; transformers' own model takes its own."""
    left: list[bool] = []
    real = Loop.__call__

    def watched(self: Loop, *args: Any, **options: Any) -> Any:
        result = real(self, *args, **options)
        left.append(self.left)
        return result

    monkeypatch.setattr(Loop, "__call__", watched)
    model, _ = load_fast_model(tiny_model)
    generate_once(model, 4, 3)
    assert len(generate(model, 4, 3, Passes(lambda seconds: Pass(seconds, StepTimes((), {}))))) == 3
    assert left == [False, False]
    auto: Any = AutoModelForCausalLM
    generate_once(auto.from_pretrained(tiny_model), 4, 3)
    assert len(left) == 2
