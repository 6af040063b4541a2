"""What a calibration with a device tells of the CPU that computes everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_experts.emulated import EMULATED
from hybrid.ask.asked_model import find_model
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.ledger.alone import prompt_loads
from hybrid.ledger.prediction import predict
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity, alone, load, save, without_device
from hybrid.model import Model
from hybrid.planning.plan import plan
from hybrid.session.model import HybridModel
from planner.describe.estimate import Source
from planner.describe.hardware import PANELS, HardwareSpec, Point, TermPoint
from planner.describe.terms import MIXER
from planner_examples import bare_machine, machine

GPU = "Wide (cuda:0)"


def point(lane: str, hidden: int, seconds: float) -> Point:
    load = 0 if lane == "copy" else 2
    about: dict[str, Any] = {"intermediate": 4, "format": "q4_0", "load": load}
    return Point(lane=lane, hidden=hidden, seconds=seconds, **about)


def attention(lane: str, tokens: int, seconds: float, params: int = 8000) -> TermPoint:
    about: dict[str, Any] = {"family": "qwen3_moe", "kind": "full", "format": "q8_0"}
    about |= {"term": MIXER, "params": params, "context": tokens}
    return TermPoint(lane=lane, tokens=tokens, seconds=seconds, **about)


def with_device(hidden: int = 1, seconds: float = 1.0) -> HardwareSpec:
    """A calibration with a device: a layer takes 5 s of the host there."""
    spec = machine()
    on_device = replace(spec.cpu.layer_overhead_s, value=5.0)
    return replace(
        spec,
        summary="measured",
        cpu=replace(spec.cpu, layer_overhead_s=on_device),
        points=tuple(point(lane, hidden, seconds) for lane in ("cpu", "gpu", "copy", PANELS)),
        terms=(attention("cpu", 1, seconds), attention("cpu", 4, 4.0), attention("gpu", 1, 5.0)),
    )


def test_only_what_is_the_cpus_is_kept() -> None:
    """Not the device, its points and terms, nor what a layer's attention takes there."""
    found = without_device(with_device())
    assert (found.gpu, found.link) == (None, None)
    assert {point.lane for point in found.points} == {"cpu", PANELS}
    assert {(term.lane, term.tokens) for term in found.terms} == {("cpu", 1), ("cpu", 4)}
    overhead = found.cpu.layer_overhead_s
    assert overhead.value == pytest.approx(1.0 - 8500 / 10e9)  # 8000 weights of 8.5 bits
    assert (overhead.source, "single token's" in overhead.origin) == (Source.FITTED, True)
    assert found.summary == "measured; without gpu"
    others = replace(found.cpu, layer_overhead_s=machine().cpu.layer_overhead_s)
    assert (others, found.disk) == (machine().cpu, machine().disk)
    assert without_device(found) == found
    bare = replace(with_device(), terms=())  # nothing to tell it from
    assert without_device(bare).cpu == bare.cpu


@pytest.mark.usefixtures("quick")
def test_a_device_calibration_stands_in() -> None:
    """Where there is none of the CPU alone, one with a device is it, whichever that is; of other
    threads or other software it is not."""
    assert alone(2) is None
    here = Identity.of_this_machine(2, GPU)
    for other in (Identity.of_this_machine(3, GPU), replace(here, kernels="older")):
        save(with_device(), other)
        assert alone(2) is None
    save(with_device(), Identity.of_this_machine(2, EMULATED.calibrated_as))
    assert alone(2) == without_device(with_device())
    assert load(Identity.of_this_machine(2)) is None
    # The first GPU's counts before an emulated one's, and both know shapes.
    save(with_device(seconds=2.0), here)
    save(with_device(hidden=7, seconds=3.0), Identity.of_this_machine(2, EMULATED.calibrated_as))
    found = alone(2)
    assert found is not None
    known = {(point.hidden, point.seconds) for point in found.points}
    assert known == {(1, 2.0), (7, 3.0)}


@pytest.mark.usefixtures("quick")
def test_env_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is asked to measure what is known."""
    save(with_device(), Identity.of_this_machine(device=EMULATED.calibrated_as))
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "none of the CPU alone: the CPU's part of those below counts" in shown
    assert f"with {EMULATED.calibrated_as}" in shown
    assert "hybrid calibrate" not in shown


@pytest.mark.usefixtures("quick")
def test_the_cpus_own_calibration_counts_first() -> None:
    """Numbers of the machine are its own; of shapes and parts that it lacks the others are told."""
    own = replace(bare_machine(), points=(point("cpu", 1, 9.0),), terms=())
    save(own, Identity.of_this_machine(2))
    assert alone(2) == own
    save(with_device(), Identity.of_this_machine(2, EMULATED.calibrated_as))
    found = alone(2)
    assert found is not None
    assert (found.cpu, found.summary) == (own.cpu, own.summary)
    # Panels that were measured with other kernels' points are not joined with these.
    assert {(point.lane, point.seconds) for point in found.points} == {("cpu", 9.0)}
    assert {term.lane for term in found.terms} == {"cpu"}


@pytest.mark.usefixtures("quick")
def test_damaged_files_do_not_count() -> None:
    """A device's is passed over; the CPU's own, too, or raises, as the caller needs it."""
    device = save(with_device(), Identity.of_this_machine(2, EMULATED.calibrated_as))
    own = save(bare_machine(), Identity.of_this_machine(2))
    own.write_text(own.read_text()[:200])
    assert alone(2) == without_device(with_device())
    with pytest.raises(UsageError, match="cannot be used"):
        alone(2, load)
    device.write_text(device.read_text()[:600])
    assert alone(2) is None


def test_a_run_on_the_cpu_is_predicted_from_it(
    measured: HardwareSpec,
    tiny_model: Path,
) -> None:
    """Term by term as the planner does from the CPU's part; the dry run says the same."""
    model = HybridModel.from_pretrained(tiny_model, vram=0, threads=1)
    model.generate([1, 2, 3, 4, 5, 6, 7, 8], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    report = model.report()
    assert report.predictions == "from a calibration of this shape in these formats"
    found = find_model(model.model.hybrid_store.path)
    formats = {"experts": found.experts, "dense": found.dense}
    loads = prompt_loads(Model(model.model)) or None
    expected = predict(
        found.spec, without_device(measured), **formats, prompt=8, tokens=5, loads=loads
    )
    terms = {(term.phase, term.name): term.predicted_s for term in report.terms}
    assert terms["prefill", "a step"] == expected.ttft.value
    assert terms["decode", "a step"] == expected.tpot.value
    for vram in (0, None):  # a device that is emulated is only used where it is asked for
        dry = plan(tiny_model, vram=vram, threads=1, context=64, prompt=8, tokens=5)
        assert dry.request.hardware == without_device(measured)


def test_it_measures_what_a_calibration_of_the_cpu_does(
    measured: HardwareSpec,
    tiny_model: Path,
) -> None:
    """The same loads of experts, and the same parts at the same lengths, none missing."""
    assert main(["calibrate", str(tiny_model), "--device", "cpu", "--threads", "1"]) == 0
    own = load(Identity.of_this_machine(1))
    assert own is not None, "asking for it measures, whatever a device's calibration knows"

    def keys(spec: HardwareSpec) -> set[tuple[Any, ...]]:
        terms = {(*calibrations._term_key(term), term.tokens, term.piece) for term in spec.terms}
        return terms | {(*calibrations._point_key(point), point.load) for point in spec.points}

    beside = without_device(measured)
    assert keys(own) == keys(beside)
    for name in ("layer_overhead_s", "prompt_layer_overhead_s", "token_start_s", "start_s"):
        mine, other = getattr(own.cpu, name), getattr(beside.cpu, name)
        assert (mine.source, mine.origin) == (other.source, other.origin), name
