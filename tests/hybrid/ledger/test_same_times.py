"""``hybrid plan``, a report and the benchmarks predict the same of the same step, term by term."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.bench import hybrid as bench
from hybrid.bench.sharing import RULES, Runner, Scene
from hybrid.bench.stages import Emulated
from hybrid.ledger.alone import prompt_loads
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.ledger.metrics import STEP, WITHIN, GenerationTimes
from hybrid.ledger.prediction import predicted
from hybrid.ledger.residual import DECODE, PREFILL, Phase
from hybrid.ledger.shared import step_terms
from hybrid.ledger.timeline import LayerRecord, Timeline
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.planning.plan import plan
from hybrid.session.model import HybridModel
from planner.cost.cost import CostModel
from planner.cost.step_times import StepTimes
from planner.decide.cache import ExpertCache
from planner.decide.director import Decision
from planner.decide.policies import MRS
from planner.decide.popularity import Popularity
from planner.describe.estimate import Estimate
from planner.describe.hardware import HardwareSpec, TermPoint
from planner.describe.model import ModelSpec
from planner.describe.terms import (
    CALL,
    CPU,
    DECIDING,
    DENSE,
    EXPERTS,
    HANDING,
    HEAD,
    JOINING,
    MIXER,
    TERMS,
    WITHIN_EXPERTS,
)
from planner.foretell.dryrun import dry_run
from planner.foretell.memory import Fit
from planner.foretell.request import Request
from planner.foretell.routing import synthetic
from planner.foretell.run import Run
from planner.foretell.simulate import Simulator
from planner_examples import bare_machine, machine, machine_table, quantity, small_model

PROMPT, TOKENS = 12, 6


def described() -> HardwareSpec:
    """A machine that nobody measured: deciding is described, copies slow the CPU down."""
    table = machine_table()
    link = {**table["link"], "bytes_per_s": quantity(6e9), "cpu_slowdown": quantity(1.5)}
    cpu = {**table["cpu"], "deciding_s": quantity(3e-6), "layer_overhead_s": quantity(2e-5)}
    return machine(cpu=cpu, link=link)


def calibrated(model: ModelSpec) -> HardwareSpec:
    """The same, measured with the model: a token's attention takes longer the more came before."""
    moe = next(layer for layer in model.layers if layer.moe)
    params, head = model.experts.params_each, model.head_params

    def point(term: str, params: int, fmt: str, tokens: int, context: int, s: float) -> TermPoint:
        kind = moe.mixer.kind if term == MIXER else ""
        where = {"tokens": tokens, "context": context, "seconds": s, "lane": "gpu"}
        return TermPoint(
            term=term, family=model.family, kind=kind, params=params, format=fmt, **where
        )

    points = [
        *(point(MIXER, moe.mixer.params, "bf16", 1, at, 1e-5 + 1e-7 * at) for at in (1, 900)),
        *(point(MIXER, moe.mixer.params, "bf16", at, at, 1e-5 * at) for at in (2, 64)),
    ]
    for at in (1, 2, 64):
        points += [
            point(HEAD, head, "bf16", at, at, 7e-5 * at),
            point(CALL, head, "bf16", at, at, 9e-5 * at),
            point(DECIDING, params, "q4_0", at, at, 2e-5 * at),
            point(HANDING, params, "q4_0", at, at, 3e-6),
            point(JOINING, params, "q4_0", at, at, 4e-6 * at),
        ]
    return replace(described(), terms=tuple(points))


class Told(Simulator):
    """A simulation that keeps what was decided in every layer, and how many copies followed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.decided: list[list[Any]] = []
        assert self.director is not None
        place, fill = self.director.place, self.director.fill

        def placing(*args: Any, **options: Any) -> Decision:
            self.decided.append([place(*args, **options), 0])
            return self.decided[-1][0]  # type: ignore[no-any-return]

        def filling(*args: Any) -> Any:
            fills = fill(*args)
            self.decided[-1][1] = len(fills)
            return fills

        self.director.place, self.director.fill = placing, filling  # type: ignore[method-assign]


def simulated(cost: CostModel, batch: int, slots: int) -> tuple[Run, list[list[Any]]]:
    """What a run does with some experts resident, and what was decided in it."""
    model = cost.model
    cache = ExpertCache(MRS(model.moe_layers, model.experts.count), [slots] * model.moe_layers)
    for layer in range(model.moe_layers):
        for expert in range(slots):
            cache.admit(layer, expert)
    routing = synthetic(model, PROMPT, TOKENS, batch, seed=1)
    placed = Fit((), 0, 0, (slots,) * model.moe_layers, 1.0)
    told = Told(cost, placed, routing, cache, prefetch=True, refill=True)
    assert told.director is not None
    told.director.deciding_s = 0.0
    return told.simulate(PROMPT, batch), told.decided


def ledger_of(cost: CostModel, batch: int, decided: list[list[Any]]) -> dict[str, Phase]:
    """What the ledger of a session says that took the same decisions."""
    timeline, seconds = Timeline(), DenseSeconds(cost, 0)
    copy: Any = SimpleNamespace(done=lambda: True, span=lambda: None, what="copy")
    left = iter(decided)
    for step in range(1 + TOKENS):
        tokens = batch * (1 if step else PROMPT)
        seconds.at(PROMPT + step, batch)
        for layer in range(cost.model.moe_layers):
            decision, fills = next(left)
            copies = [copy] * (len(decision.plan.copies) + fills)
            mixer_s = seconds.mixer(layer, tokens)
            assert decision.work.gpu_free_s == seconds.shared(layer, tokens)
            times = (0.0, 0.0, 0.0, 0.0, 0.0)
            record = LayerRecord(tokens, not step, decision, mixer_s, *times, [], copies)
            timeline.add(record, cost)
        timeline.step(not step, 0.0, seconds.head(tokens))
    timeline.finish()
    return timeline.phases


MODELS = (
    small_model(),
    small_model(decoder_sparse_step=1, mlp_only_layers=[0, 3, 5]),
)


@pytest.mark.parametrize("slots", [3, 6])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", MODELS, ids=["all layers", "dense between"])
@pytest.mark.parametrize("measured", [False, True], ids=["described", "calibrated"])
def test_a_simulation_and_a_ledger_have_the_same_terms(
    measured: bool, model: ModelSpec, batch: int, slots: int
) -> None:
    """Of the same decisions: copies beyond the plan, dense layers between, several sequences."""
    cost = CostModel(model, calibrated(model) if measured else described(), "q4_0")
    run, decided = simulated(cost, batch, slots)
    assert any(fills for _, fills in decided)
    phases = ledger_of(cost, batch, decided)
    decode = StepTimes(run.layer_terms, {HEAD: run.decode_terms()[HEAD]})
    expected = decode.as_timed([layer.moe for layer in model.layers])
    found = phases[DECODE].predicted
    assert len(found.layers) == model.moe_layers
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours == pytest.approx(theirs)
    assert found.around == pytest.approx(expected.around)
    prefill = phases[PREFILL].predicted
    assert prefill.terms[DECIDING] == pytest.approx(run.prefill.terms[DECIDING])
    assert prefill.duration_s == pytest.approx(run.prefill.duration_s - run.prefill.terms[CALL])
    if measured:
        assert min(run.decode_terms()[name] for name in (DECIDING, JOINING)) > 0


def grouped(terms: dict[str, Estimate]) -> dict[str, float]:
    """A plan's terms as a report has them: what experts consist of is one term there."""
    assert set(terms) == set(TERMS)
    found = {name: terms[name].value for name in (MIXER, DECIDING, HEAD, CALL)}
    return found | {EXPERTS: sum(terms[name].value for name in WITHIN_EXPERTS)}


@pytest.fixture(params=["described", "calibrated"])
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Request, Scene]]:
    """A plan of a model whose experts are all resident, and the same on an emulated device."""
    model = small_model()
    hardware = described() if request.param == "described" else calibrated(model)
    asked = Request(model=model, hardware=hardware, context=64, prompt=PROMPT, tokens=TOKENS)
    routing = asked.routing()
    uses = routing.uses()
    known = Popularity(model.name, TOKENS, uses)
    stage = Emulated(asked.cost)
    yield asked, Scene(stage, PROMPT, routing, known, 1)
    stage.close()


def test_plan_report_and_bench_predict_the_same_where_experts_are_shared(
    shared: tuple[Request, Scene],
) -> None:
    """Every term of a token and of the prompt, and their sums."""
    asked, scene = shared
    planned = dry_run(asked).prediction
    assert planned is not None
    assert planned.run.hit_rate == 1.0
    slots = scene.model.moe_layers * scene.model.experts.count
    runner = Runner(scene, RULES[-1], slots)
    prefill_s, decode_s = runner.run()
    times = GenerationTimes(
        sequences=1,
        prompt_tokens=PROMPT,
        new_tokens=1 + TOKENS,
        ttft_s=prefill_s,
        decode_s=sum(decode_s),
        ended="max_new_tokens",
    )
    reported = step_terms(runner.executor.timeline, asked.cost, times)
    for phase, terms, whole in (
        (PREFILL, planned.prefill_terms, planned.ttft),
        (DECODE, planned.terms, planned.tpot),
    ):
        found = {term.name: term.predicted_s for term in reported if term.phase == phase}
        assert found.pop(STEP) == pytest.approx(whole.value)
        assert {name: s for name, s in found.items() if name not in WITHIN} == pytest.approx(
            grouped(terms)
        )
    row = list(bench._compare(scene, "small", 1.0, 1, lambda text: None))[-1]
    benched = {name: both["predicted"] for name, both in row["decode_terms_s"].items()}
    expected = grouped(planned.terms)
    around_s = expected.pop(CALL)  # the bench's steps have nothing around them
    assert {name: s for name, s in benched.items() if name not in WITHIN} == pytest.approx(expected)
    assert row["decode_predicted_s"] == pytest.approx(planned.tpot.value - around_s)


def test_plan_report_and_bench_predict_the_same_on_the_cpu_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every term of a token, of the layers, and of the prompt; its experts as they were routed."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    calibrations.save(bare_machine(), Identity.of_this_machine(1))
    model = HybridModel.from_pretrained(tiny_model, threads=1)
    model.generate(list(range(3, 3 + PROMPT)), max_new_tokens=1 + TOKENS, min_new_tokens=1 + TOKENS)
    planned = plan(tiny_model, vram=0, threads=1, prompt=PROMPT, tokens=TOKENS).prediction
    loads = prompt_loads(model.loaded) or None
    benched = predicted(model.loaded, PROMPT, 1 + TOKENS, threads=1, loads=loads)
    assert planned is not None
    assert benched is not None
    report = model.report()
    for phase, terms, bench_terms in (
        (PREFILL, planned.prefill_terms, benched.prompt),
        (DECODE, planned.terms, benched.token),
    ):
        every = {term.name: term.predicted_s for term in report.terms if term.phase == phase}
        reported = {name: seconds for name, seconds in every.items() if seconds}
        whole_s = reported.pop(STEP)
        assert reported == {name: term.value for name, term in bench_terms.items() if term.value}
        assert whole_s == pytest.approx(sum(reported.values()))
        expected = {name: term.value for name, term in terms.items() if term.value}
        if phase == PREFILL:  # a plan does not know which experts the prompt will use
            reported.pop(CPU)
            expected.pop(CPU)
        assert reported == expected
    layers = [term for term in report.layers if term.phase == DECODE]
    for name in (MIXER, CPU, DENSE):
        together_s = sum(term.predicted_s for term in layers if term.name == name)
        assert together_s == pytest.approx(planned.terms[name].value)
