"""Predictions of a run on the CPU, and how far measurements are from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.ask.asked_model import find_model
from hybrid.bench.model import generate_once
from hybrid.ledger.alone import begin_run, prompt_loads
from hybrid.ledger.metrics import RunReport, Term
from hybrid.ledger.prediction import calibrating, predict
from hybrid.loading import load_fast_model, set_threads
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.coverage import Coverage
from hybrid.model import Model
from hybrid.session.model import HybridModel
from hybrid.session.report import run_report
from hybrid.weights.checkpoint import convert
from planner.cost.cost import CostModel
from planner.describe.estimate import Source
from planner.describe.hardware import Point, TermPoint
from planner.describe.model import ModelSpec
from planner.describe.terms import CALL, CPU, DENSE, HEAD, MIXER, SAMPLING, TEXT
from planner_examples import bare_machine, machine, small_model

FORMATS = {"experts": "q4_0", "dense": "bf16"}


def test_a_prediction_is_the_planners() -> None:
    """Terms are those of the cost model, layer by layer, whatever GPU the machine has."""
    model = small_model()
    cost = CostModel(model, bare_machine(), "q4_0", "bf16")
    found = predict(model, machine(), **FORMATS, prompt=16, tokens=3)
    assert found == predict(model, bare_machine(), **FORMATS, prompt=16, tokens=3)
    mixer_s = cost.mixer(model.layers[0], 16, 16).value
    assert found.prompt[MIXER].value == pytest.approx(6 * mixer_s)
    assert found.token[CPU].value == pytest.approx(6 * cost.experts.cpu_set_s([1] * 4))
    assert found.token[HEAD].value == cost.head(1).value
    assert found.tpot.value == pytest.approx(sum(e.value for e in found.token.values()))
    assert found.ttft.value == pytest.approx(sum(e.value for e in found.prompt.values()))
    assert predict(model, machine(), **FORMATS, prompt=16, tokens=1).token == {}


def test_known_loads_replace_the_made_up_ones() -> None:
    """The prompt's experts cost what the router chose: all tokens to four, or spread evenly."""
    model = small_model()
    cost = CostModel(model, bare_machine(), "q4_0", "bf16")
    for loads in ([16] * 4 + [0] * 12, [4] * 16):
        found = predict(model, bare_machine(), **FORMATS, prompt=16, tokens=1, loads=[loads] * 6)
        expected = cost.experts.cpu_set_s([load for load in loads if load])
        assert found.prompt[CPU].value == pytest.approx(6 * expected)


def test_a_calibrated_machine_predicts_what_it_measured() -> None:
    """Parts of a layer add up over the layers; a call's own time is a term of its own."""
    model = small_model()
    layer, experts = model.layers[0], model.experts
    about = {"family": "qwen3_moe", "format": "bf16", "tokens": 1, "context": 1, "error": 0.01}
    points = tuple(
        TermPoint(**{**about, "term": term, "params": params, "seconds": seconds, **more})
        for term, params, seconds, more in (
            (MIXER, layer.mixer.params, 1.0, {"kind": "full"}),
            (DENSE, layer.ffn_params, 0.0, {"error": None}),
            (HEAD, model.head_params, 3.0, {}),
            (CALL, model.head_params, 4.0, {}),
            (CPU, experts.params_each, 0.5, {"format": "q4_0"}),
            (SAMPLING, 2 * model.head_params, 5.0, {}),
            (TEXT, 2 * model.head_params, 7.0, {}),
        )
    )
    spec = replace(bare_machine(), terms=points)
    found = predict(model, spec, **FORMATS, prompt=2, tokens=2).token
    assert {name: e.value for name, e in found.items() if e.value} == pytest.approx(
        {MIXER: 6.0, CPU: 6 * 4 * 0.5, HEAD: 3.0, CALL: 4.0}
    )
    drawn = predict(model, spec, **FORMATS, prompt=2, tokens=2, extras=(SAMPLING, TEXT))
    assert drawn.token[CALL].value == 4.0 + 5.0 / 2 + 7.0
    assert drawn.prompt[CALL].value == 5.0 / 2, "the first token is there before it is written"


def test_points_of_experts_count_in_prompts() -> None:
    """Loads between two points cost what lies between them."""
    model = small_model()
    shape = {"hidden": 1024, "intermediate": 512, "format": "q4_0"}
    points = tuple(
        Point(lane="cpu", load=load, seconds=seconds, **shape)
        for load, seconds in ((1, 1.0), (9, 9.0))
    )
    spec = replace(bare_machine(), points=points)
    loads = [[5] * 16] * 6
    found = predict(model, spec, **FORMATS, prompt=20, tokens=1, loads=loads)
    assert found.prompt[CPU].value == pytest.approx(6 * (16 * 5.0 + 1e-5))


def test_loads_of_a_prompt_are_counted_piece_by_piece(tiny_model: Path) -> None:
    """One row a layer and piece, every token's experts in it; steps of the kernels do not count."""
    network, _ = load_fast_model(tiny_model)
    set_threads(1)
    begin_run(Model(network), 600)
    generate_once(network, 600, 3)
    rows = prompt_loads(Model(network))
    assert [sum(row) for row in rows] == [2 * 512, 2 * 512, 2 * 88, 2 * 88]
    assert {len(row) for row in rows} == {8}
    for prompt, counted in ((40, [80, 80]), (5, [])):
        begin_run(Model(network), prompt)
        assert prompt_loads(Model(network)) == []
        generate_once(network, prompt, 3)
        assert [sum(row) for row in prompt_loads(Model(network))] == counted


def test_a_report_predicts_the_experts_that_ran(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt's prediction is that of the loads which the routers made."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    ids = model.encode("abcdefgh" * 8)
    model.generate(ids, max_new_tokens=2)
    found = find_model(model.model.hybrid_store.path)
    expected = predict(
        found.spec,
        bare_machine(),
        experts=found.experts,
        dense=found.dense,
        prompt=64,
        tokens=2,
        loads=prompt_loads(Model(model.model)),
    )
    terms = {(term.phase, term.name): term for term in model.report().terms}
    assert terms["prefill", CPU].predicted_s == expected.prompt[CPU].value
    assert terms["prefill", "a step"].predicted_s == expected.ttft.value


def parts_of(model: ModelSpec, fmt: str) -> tuple[TermPoint, ...]:
    """Attention as measured in a format."""
    about = {"family": model.family, "format": fmt, "tokens": 1, "context": 1, "seconds": 1.0}
    params = model.layers[0].mixer.params
    return (TermPoint(term=MIXER, kind="full", params=params, error=0.01, **about),)


def test_nothing_is_predicted_silently_from_another_format() -> None:
    """What was not measured in these formats says so, with a larger error and the remedy."""
    model = small_model()
    shape = {"hidden": 1024, "intermediate": 512, "format": "q4_0"}
    points = tuple(
        Point(lane="cpu", load=load, seconds=load / 1e3, error=1e-6, **shape) for load in (1, 9)
    )
    spec = replace(bare_machine(), points=points, terms=parts_of(model, "bf16"))
    options: dict[str, Any] = {"experts": "q4_0", "prompt": 16, "tokens": 3}
    own = predict(model, spec, dense="bf16", **options)
    assert own.coverage == Coverage(True, True, ("bf16",), 0.0)
    assert own.coverage.advice("X") == "from a calibration of this shape in these formats"
    assert own.token[MIXER].error == pytest.approx(6 * 0.01)
    other = predict(model, spec, dense="q4_0", **options)
    assert (other.coverage.whole, other.coverage.like) == (False, ("bf16",))
    assert other.token[MIXER].source is Source.ANALYTIC
    for terms in (other.prompt, other.token):
        for name in (MIXER, HEAD):
            assert terms[name].error >= 0.3 * terms[name].value
        assert terms[CPU].error < 0.1 * terms[CPU].value
    assert other.coverage.advice("'hybrid calibrate M'") == (
        "from rates of this machine for attention and dense layers (measured in bf16 only), "
        "± 30%, as they were not measured; 'hybrid calibrate M' measures them"
    )
    bare = predict(model, bare_machine(), dense="q4_0", **options)
    assert "for its experts and attention and dense layers, ± 30%" in str(bare.coverage)
    assert bare.token[CPU].error >= 0.3 * bare.token[CPU].value


def test_what_was_disturbed_says_so() -> None:
    """With how much, and that measuring again is the remedy."""
    model = small_model()
    shape = {"hidden": 1024, "intermediate": 512, "format": "q4_0"}
    points = (Point(lane="cpu", load=1, seconds=1.0, disturbed=0.25, **shape),)
    spec = replace(bare_machine(), points=points, terms=parts_of(model, "bf16"))
    found = Coverage.of(spec, model, "q4_0", "bf16")
    assert found.whole
    assert found.advice("X") == (
        "from a calibration of this shape in these formats, while other programs used 25% of the "
        "processors; X measures again"
    )
    others = replace(spec, points=(), terms=(replace(spec.terms[0], family="x", disturbed=0.5),))
    assert Coverage.of(others, model, "q4_0", "bf16").disturbed == 0.0


def test_a_report_says_what_it_predicts_from(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a calibration the command that makes one, formats included; errors with one. The
    time around the kernels is a term that is measured."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    model = HybridModel.from_pretrained(tiny_model, dense="q8_0", threads=1)
    assert model.report().predictions is None, "nothing ran yet"
    model.generate(model.encode("abcdefgh"), max_new_tokens=4)
    report = model.report()
    assert report.predictions is not None
    assert report.predictions.startswith("none: this machine was not calibrated yet; ")
    threads = "" if host.default_threads() == 1 else " --threads 1"
    command = f"'hybrid calibrate {report.model} --dense q8_0{threads}'"
    assert f"{command} measures it" in report.predictions
    assert f"predictions          {report.predictions}" in str(report).splitlines()
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    report = model.report()
    assert report.predictions is not None
    assert report.predictions.startswith("from rates of this machine for its experts")
    assert report.to_dict()["predictions"] == report.predictions
    terms = {(term.phase, term.name): term for term in report.terms}
    assert terms["decode", MIXER].error is not None
    assert terms["decode", MIXER].error >= 0.3
    assert "±" in str(terms["decode", MIXER])
    whole = terms["decode", "a step"].measured_s
    assert whole is not None
    parts = [terms["decode", name].measured_s for name in (MIXER, CPU, HEAD, CALL)]
    assert whole == pytest.approx(sum(part or 0.0 for part in parts))
    shares = [term for term in report.layers if term.name == CPU]
    assert [share.layer for share in shares] == list(
        range(len(model.model.hybrid_fast.decoder.decoder.layers))
    )
    assert sum(share.measured_s or 0 for share in shares) == pytest.approx(parts[1])
    assert sum(share.predicted_s for share in shares) == pytest.approx(
        terms["decode", CPU].predicted_s
    )
    assert "decode layers" in str(report)
    assert calibrating(Model(model.model), "M") == "'hybrid calibrate M --dense q8_0'"


def test_what_computes_otherwise_is_not_predicted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration in one type says nothing of a run in another, and the report says so."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        model = HybridModel.from_pretrained(tiny_model, dtype=dtype, threads=1)
        model.generate(model.encode("abcdefgh"), max_new_tokens=4)
        monkeypatch.setattr("hybrid.ledger.prediction.automatic_dtype", lambda _, own=dtype: own)
        assert model.report().terms
        monkeypatch.setattr("hybrid.ledger.prediction.automatic_dtype", lambda _, own=other: own)
        report = model.report()
        assert not report.terms
        assert report.predictions == (
            f"none: the model computes in {dtype}, calibrations of it are in {other}; "
            "--dtype auto is that"
        )


def test_only_steps_of_the_kernels_are_told_apart(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of one token is a step like the others; transformers' own code tells no parts."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    model = HybridModel.from_pretrained(tiny_model, dense="q8_0", threads=1)
    fast = model.model.hybrid_fast.decoder
    model.generate(torch.tensor([[3]]), max_new_tokens=4, do_sample=False)
    assert fast.watch.pieces == 4
    terms = {(term.phase, term.name): term.measured_s for term in model.report().terms}
    spent_s = fast.decoder.spent_s()
    assert spent_s is not None
    assert terms["decode", HEAD] == pytest.approx(spent_s[-1, 0] / 4, rel=0.2)
    model.generate(
        model.encode("abcd"), max_new_tokens=4, output_hidden_states=True, do_sample=False
    )
    terms = {(term.phase, term.name): term.measured_s for term in model.report().terms}
    assert fast.watch.pieces == 0
    assert terms["decode", "a step"] is not None
    assert [terms[key] for key in terms if key[1] != "a step"] == [None] * (len(terms) - 2)
    assert not model.report().layers


def test_a_model_whose_directory_is_gone_is_not_taken_for_another(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when it was called as a model that ships: it was read while it was there."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    convert(tiny_model, tmp_path / "mixtral", experts="q4_0")
    monkeypatch.chdir(tmp_path)
    model = HybridModel.from_pretrained("mixtral", threads=1)
    monkeypatch.chdir(tmp_path.parent)
    model.generate(model.encode("abcd"), max_new_tokens=3)
    (tmp_path / "mixtral").rename(tmp_path / "other")
    report = model.report()
    assert (report.predictions or "").startswith("from rates of this machine")
    assert len({term.layer for term in report.layers}) == len(model.model.model.layers)
    report = run_report(Model(model.model), None, model._last.times, name="", threads=1, load_s=0)
    assert "mixtral is there no more; load the model" in (report.predictions or "")


def test_long_runs_are_predicted_from_their_middle() -> None:
    """Attention over a context that grows costs as much more on average as in the middle."""
    model, machine = small_model(), bare_machine()
    few, many = (
        predict(model, machine, experts="q4_0", dense="bf16", prompt=prompt, tokens=tokens)
        for prompt, tokens in ((950, 129), (14, 2001))
    )
    assert many.token[MIXER].value == pytest.approx(few.token[MIXER].value, rel=0.02)


def test_the_report_blames_what_it_did_not_measure() -> None:
    """A term that is measured and nearly right is not named for what the others took."""

    def off(*terms: tuple[str, float, float | None]) -> list[str]:
        report = RunReport(
            **dict.fromkeys(("model", "family", "experts_format", "dense_format"), "x"),
            **dict.fromkeys(("compute_dtype", "decode_path", "simd_level", "threads"), "x"),
            many_tokens="x",
            figures={},
            terms=tuple(Term("decode", *term) for term in terms),
            slow_paths=(),
        )
        return [line for line in str(report).splitlines() if line.startswith("decode is off")]

    whole = ("a step", 0.010, 0.020)
    (line,) = off(whole, ("experts", 0.006, 0.007), ("head", 0.004, None))
    assert line.endswith("most by head: took 9 ms longer than predicted")
    (line,) = off(whole, ("experts", 0.002, 0.011), ("head", 0.004, None), ("cpu", 0.0, 9.0))
    assert line.endswith("most by experts: took 9 ms longer than predicted")
    others = (("head", 0.001, None), ("call", 0.001, None), ("attention", 0.001, None))
    (line,) = off(whole, ("experts", 0.007, 0.007), *others)
    assert line.endswith("what only the whole tells: took 10 ms longer than predicted")
    assert off(("a step", 0.010, 0.0109), ("experts", 0.002, 0.011)) == []
