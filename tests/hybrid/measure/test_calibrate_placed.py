"""A calibration that puts its layers on a device: what is kept, who uses it, what went wrong."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_experts.cuda import CUDA
from gpu_experts.cuda.runtime import ran_out_of_memory as no_memory
from gpu_experts.emulated import EMULATED
from gpu_experts.emulated.device import EmulatedDevice
from hybrid.ask.asked_model import find_model
from hybrid.cli import main
from hybrid.demo import demo_path
from hybrid.loading import load_fast_model
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.devices import open_device
from hybrid.measure import calibrate as calibration
from hybrid.measure import replica
from hybrid.measure import shared as measure_placed
from hybrid.measure.calibrate import hardware_for
from hybrid.measure.shared import UnmeasuredError
from hybrid.planning.plan import plan
from hybrid.session.known import machine_with
from hybrid.session.model import HybridModel
from planner.describe.estimate import Source
from planner.describe.hardware import PANELS, HardwareSpec, Point, TermPoint
from planner.describe.terms import (
    CALL,
    DECIDING,
    DENSE,
    EXPERTS,
    HANDING,
    HEAD,
    JOINING,
    MIXER,
    SAMPLING,
)
from planner_examples import bare_machine, machine, save_config

TERMS = {MIXER, DENSE, HEAD, CALL, DECIDING, HANDING, JOINING, SAMPLING}
OF_EXPERTS = {DECIDING, HANDING, JOINING}
"""Of those, what depends on the experts' format and not on the dense weights'."""


def test_the_devices_terms_are_kept_apart(measured: HardwareSpec) -> None:
    """Each term of a run on the device is measured there, in prompts and tokens, with its spread.

    Nothing of it counts for the CPU alone, whose own calibration is another file.
    """
    on_device = [term for term in measured.terms if term.lane == "gpu"]
    assert {term.term for term in on_device} == TERMS
    assert {(t.tokens, t.context) for t in on_device if t.term == MIXER} >= {(2, 2), (8, 8)}
    assert sum(t.tokens == 1 for t in on_device if t.term == MIXER) == 1
    # The emulated device's dense layers are torch's, in the type that it computes in.
    assert {t.format for t in on_device if t.term not in OF_EXPERTS} <= {"f32", "bf16"}
    assert {t.format for t in on_device if t.term in OF_EXPERTS} == {"q4_0"}
    # Of other models on this device, too, something is known of the host's part.
    (deciding,) = [t for t in on_device if t.term == DECIDING and t.tokens == 1]
    assert measured.cpu.deciding_s is not None
    assert measured.cpu.deciding_s.value == pytest.approx(deciding.seconds / 2)  # top-2
    spread = [t for t in on_device if t.term in (MIXER, HEAD, CALL, DECIDING)]
    handing = [t for t in on_device if t.term == HANDING and t.tokens == 1]
    assert all(t.error is not None for t in handing if t.seconds)
    assert all(t.error is not None and t.seconds > 0 for t in spread if t.tokens == 1)
    panels = {PANELS} if host.has_native_bf16() else set()
    assert {point.lane for point in measured.points} == {"cpu", "gpu", "copy"} | panels
    assert "not measured" not in measured.summary
    overhead = measured.cpu.layer_overhead_s
    assert (overhead.source, "on the device" in overhead.origin) == (Source.FITTED, True)
    assert "qwen3_moe with" in dict(calibrations.main_numbers(measured))["on the device"]
    assert calibrations.load(Identity.of_this_machine(1)) is None


def test_a_run_is_predicted_from_what_was_measured(
    measured: HardwareSpec, tiny_model: Path
) -> None:
    """The runtime finds the calibration, and the dry run on it says the same of every term."""
    model = HybridModel.from_pretrained(tiny_model, vram="640MiB", threads=1, context=64)
    placement = model.placement
    assert placement is not None
    assert placement.hardware.terms == measured.terms
    assert placement.cost.knows()
    model.generate([1, 2, 3], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert str(model.report().predictions).startswith("for this-machine: ")
    assert "rates only" not in str(model.report().predictions)
    terms = {term.name: term for term in model.report().terms if term.phase == "decode"}
    dry = plan(tiny_model, vram="640MiB", threads=1, context=64, prompt=8, tokens=5)
    assert dry.request.hardware == placement.hardware
    assert dry.request.dense == "f32"  # as small models are computed on any processor
    assert dry.fit == placement.fit
    assert dry.prediction is not None
    for name in (MIXER, HEAD, CALL):
        assert terms[name].predicted_s == pytest.approx(
            dry.prediction.terms[name].value, rel=1e-6
        ), name
        assert (terms[name].measured_s or 0) > 0
    whole = terms["a step"]
    parts = (MIXER, DECIDING, EXPERTS, HEAD, CALL)
    assert sum(terms[name].predicted_s for name in parts) == pytest.approx(whole.predicted_s)


def test_a_report_says_that_nothing_was_measured(quick: Path, tiny_model: Path) -> None:
    """Whose numbers the predictions are made of, and the command that makes them this machine's."""
    model = HybridModel.from_pretrained(tiny_model, vram="640MiB", threads=1, context=64)
    model.generate([1, 2, 3], max_new_tokens=2, do_sample=False)
    told = str(model.report().predictions)
    assert "RTX 4060" in told
    command = f"hybrid calibrate {tiny_model} --device emulated"
    threads = "" if host.default_threads() == 1 else " --threads 1"
    assert f"'{command}{threads}' measures them" in told


def test_another_model_is_still_planned_as_a_gpus(measured: HardwareSpec) -> None:
    """An emulated device that was measured with other experts stands for the GPU as before."""
    device = EmulatedDevice(1 << 30, run=lambda *_: None)
    assert device.name == EMULATED.calibrated_as
    found = machine_with(device, demo_path(), 1).spec
    assert found.gpu is not None
    assert "RTX 4060" in found.gpu.name


def test_a_load_measures_only_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is never calm, too; the command measures that again."""
    wanted = find_model(demo_path())
    shape = wanted.spec.experts
    points = tuple(
        Point(
            lane="cpu",
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            format=wanted.experts,
            load=load,
            seconds=1e-4 * load,
            disturbed=0.1,
        )
        for load in (1, 8)
    )
    terms = tuple(
        TermPoint(
            term=MIXER,
            family=wanted.spec.family,
            kind=mixer.kind,
            params=mixer.params,
            format=wanted.dense,
            tokens=1,
            context=1,
            seconds=1e-3,
        )
        for mixer in {layer.mixer for layer in wanted.spec.layers}
    )
    made: list[HardwareSpec] = []

    def calibrate(*_: Any, **__: Any) -> HardwareSpec:
        made.append(replace(bare_machine(), points=points, terms=terms))
        return made[-1]

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    device: Any = SimpleNamespace(name="Wide (cuda:0)", backend=CUDA)
    found = [machine_with(device, demo_path(), 1).spec for _ in range(3)]
    assert len(made) == 1
    assert found[1:] == [calibrations.load(Identity.of_this_machine(1, device.name))] * 2
    hardware_for(demo_path(), device=device, threads=1)
    assert len(made) == 2


DEFECTS = (MemoryError("out of memory"), RuntimeError("a shape is wrong"))


@pytest.mark.parametrize(
    "error",
    [
        UnmeasuredError("it is too small"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        *DEFECTS,
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said(
    error: Exception,
    quick: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is kept, and the reason stands where everybody reads it; defects are raised."""

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(measure_placed, "Placed", refuse)
    device = open_device("emulated", None, 1)
    monkeypatch.setattr(device, "backend", replace(EMULATED, ran_out_of_memory=no_memory))
    options: dict[str, Any] = {"device": device, "threads": 1}
    if error in DEFECTS:
        with pytest.raises(type(error), match=str(error)):
            hardware_for(tiny_model, **options)
        return
    spec = hardware_for(tiny_model, **options)
    assert f"attention and dense layers on {EMULATED.calibrated_as} ({error})" in spec.summary
    assert {term.lane for term in spec.terms} == {"cpu"}
    assert spec.gpu is not None
    assert hardware_for(tiny_model, **options) == spec  # it is not tried again and again


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_layers_is_kept(
    fails: bool, quick: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each network is gone before the next one, and all of them before the files are removed.

    Garbage is not collected by itself meanwhile, as in a run that measures when it loads a model.
    """
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def count() -> None:
        alive.append(sum(network() is not None for network in made))

    def load(*args: Any, **options: Any) -> Any:
        count()
        network, directory = load_fast_model(*args, **options)
        made.append(weakref.ref(network))
        return network, directory

    class Folder(tempfile.TemporaryDirectory[str]):
        def __exit__(self, *error: Any) -> None:
            count()
            super().__exit__(*error)

    def fail(*_: Any) -> None:
        raise UnmeasuredError("it failed")

    for module in (replica, measure_placed):
        monkeypatch.setattr(module, "load_fast_model", load)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", Folder)
    if fails:
        monkeypatch.setattr(measure_placed.Placed, "extras", fail)
    gc.collect()
    gc.disable()
    try:
        device = open_device("emulated", None, 1)
        calibration.calibrate(tiny_model, device=device, threads=1, limit_s=0.5)
    finally:
        gc.enable()
    assert len(made) == 2
    assert alive == [0, 0, 0]


def test_what_there_was_no_time_for_is_named(
    quick: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without time the shortest prompt and its tokens are measured, and the rest is told."""
    monkeypatch.setattr(calibration, "PROMPTS", (2, 8, 64))
    monkeypatch.setattr(calibration, "DECODED_AFTER", (8, 64))
    told: list[str] = []
    device = open_device("emulated", None, 1)
    spec = hardware_for(tiny_model, device=device, threads=1, limit_s=0.1, progress=told.append)
    assert f"prompts of 64 on {EMULATED.calibrated_as}" in spec.summary
    assert f"putting the layers on {EMULATED.calibrated_as}" in told
    assert {t.tokens for t in spec.terms if t.lane == "gpu"} == {1, 2, 8}


def test_a_gpu_that_was_measured_is_planned_with(
    quick: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without --hardware plans are about this machine with its first GPU, as runs are."""
    words = ["plan", str(save_config(quick / "model")), "--tokens", "2", "--prompt", "8", "--json"]
    for name, device in (
        ("alone", ""),
        ("emulated", EMULATED.calibrated_as),
        ("second", "Big (cuda:1)"),
        ("first", "Wide (cuda:0)"),
    ):
        spec = machine() if device else machine(gpu=None, link=None)
        calibrations.save(replace(spec, name=name), Identity.of_this_machine(device=device))
        assert main(words) == 0
        out, err = capsys.readouterr()
        expected = "alone" if device in ("", EMULATED.calibrated_as) else name
        assert json.loads(out)["hardware"]["name"] == expected
        assert err.strip().endswith("as it was calibrated") is (expected == "alone")
    assert "Wide (cuda:0)" in err
    stale = Identity.of_this_machine(device="Old (cuda:0)")
    calibrations.save(replace(machine(), name="stale"), replace(stale, kernels="older"))
    assert calibrations.in_force()[1] == "Wide (cuda:0)"
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "with Big (cuda:1)" in shown
    assert "Old" not in shown
