"""A model on an emulated device: the same text as on the CPU, and a report that says how."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from gpu_experts.device import Memory
from gpu_experts.emulated import EmulatedDevice
from hybrid.arguments.names import find_hardware
from hybrid.calibration.calibrated import Identity
from hybrid.cli import main
from hybrid.conversion.checkpoint import convert
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.loading import load_fast_model
from hybrid.model import HybridModel
from hybrid.planning.plan import plan
from hybrid.sharing.budget import Budget, cost_of, fitted_alone, usable_vram
from hybrid.sharing.devices import choose_device, emulated_device
from hybrid.sharing.placement import Placement, place_model
from hybrid.store import ExpertStore
from planner.errors import PlannerError
from planner.hardware import CONTEXT_BYTES
from planner.memory import STAGING
from planner.popularity import Popularity
from planner.report import tables
from planner.routing import read_trace

if TYPE_CHECKING:
    from gpu_experts.device import Device

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
PROMPT = "def main(argv):\n    "
#: Of the largest logit. Sums that are rounded apart may move activations of later layers by one of
#: their 127 steps.
TOLERANCE = 5e-3


def placed(path: Path | str, slots: int, **options: Any) -> HybridModel:
    """Load ``path`` with room for ``slots`` resident experts on an exact emulated device."""
    source = demo_path() if path == "demo" else path
    model, _ = load_fast_model(source, fast=False)
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    needed = _dense_bytes(model) + (slots + STAGING) * layer.blocks.shape[1]
    return HybridModel.from_pretrained(path, vram=needed, threads=1, context=256, **options)


def _dense_bytes(model: Any) -> int:
    """What a placement takes besides slots, found by asking for too little."""
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    big = emulated_device(2 << 30, layer.shape, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    placement = place_model(model, big, hardware, Budget(None, None, 256), threads=1)
    return sum(
        item.bytes
        for item in placement.fit.items
        if item.place == "vram"
        and not item.name.startswith(("expert slots", "copies on their way"))
    )


def device_of(model: HybridModel) -> EmulatedDevice:
    executor = placement_of(model).executor
    assert executor is not None
    assert isinstance(executor.device, EmulatedDevice)
    return executor.device


def placement_of(model: HybridModel) -> Placement:
    assert model.placement is not None
    return model.placement


@pytest.fixture(scope="module")
def alone() -> HybridModel:
    return HybridModel.from_pretrained(threads=1)


@pytest.fixture(scope="module")
def text(alone: HybridModel) -> str:
    return alone.generate(PROMPT, **GREEDY)


@pytest.mark.parametrize("slots", [0, 1, 7, 40, 96])
def test_any_number_of_slots_writes_the_same_text(slots: int, text: str) -> None:
    """The trained model's greedy text does not depend on what is resident where."""
    model = placed("demo", slots)
    executor = placement_of(model).executor
    assert executor is not None
    for _ in range(2):  # the cache lives on between the calls
        assert model.generate(PROMPT, **GREEDY) == text
    executor.residents.settle(5.0)
    executor.residents.check_integrity()
    assert executor.slot_count == min(slots, 96)


@pytest.mark.parametrize(
    ("prompt", "slots"),
    [(PROMPT * 4, 30), ("class Shape:\n    def area(self) -> float:\n", 7), ("import os\n", 96)],
)
def test_logits_agree_to_rounding(alone: HybridModel, prompt: str, slots: int) -> None:
    """Whatever is resident, logits of a prompt are those of the CPU alone."""
    ids = alone.encode(prompt)
    model = placed("demo", slots)
    with torch.no_grad():
        expected = alone.model(ids).logits
        for _ in range(3):
            found = model.model(ids).logits
            assert float((found - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


def test_the_report_says_what_was_predicted_and_measured(tiny_model: Path) -> None:
    """Every term has both sides; the emulated device is named as a slow path with its remedy."""
    model = placed(tiny_model, 6)
    model.generate("abc", max_new_tokens=9, do_sample=False)
    report = model.report()
    assert "experts can be resident" in str(report.placement)
    names = {(term.phase, term.name) for term in report.terms}
    assert {("decode", "experts"), ("prefill", "attention and router"), ("decode", "link")} <= names
    whole = next(term for term in report.terms if term.name == "a step" and term.phase == "decode")
    assert whole.predicted_s > 0
    assert whole.measured_s is not None
    parts = [t for t in report.terms if t.phase == "decode" and t.name in _TERMS]
    assert sum(t.measured_s or 0 for t in parts) == pytest.approx(whole.measured_s)
    assert 0 <= (report.figures["hit_rate"].value or 0) <= 1
    assert any("emulated device instead of a GPU" in path.what for path in report.slow_paths)
    values = report.to_dict()
    assert json.loads(json.dumps(values))["terms"][0]["phase"] == "prefill"
    assert "predicted" in str(report)
    executor = placement_of(model).executor
    assert executor is not None
    shares = [t for t in report.layers if (t.phase, t.name) == ("decode", "experts")]
    assert [share.layer for share in shares] == list(range(len(executor.layers)))
    experts = next(t for t in report.terms if (t.phase, t.name) == ("decode", "experts"))
    assert sum(share.measured_s or 0 for share in shares) == pytest.approx(experts.measured_s)
    assert "ms predicted | measured" in str(report)


_TERMS = ("attention and router", "deciding", "experts", "output head", "around the layers")


def test_a_batch_decodes_in_the_decode_phase_and_loading_counts_nothing(tiny_model: Path) -> None:
    """Several sequences' tokens are no prompt; the warm-up is nobody's session."""
    model = placed(tiny_model, 6)
    executor = placement_of(model).executor
    assert executor is not None
    assert executor.usage.tokens == 0
    model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4, do_sample=False)
    phases = executor.timeline.phases
    assert (phases["prefill"].measured.steps, phases["decode"].measured.steps) == (1, 3)
    assert executor.usage.tokens == 2 * (3 + 3)


def test_a_closed_device_leaves_a_working_model(text: str) -> None:
    """close() gives the device's memory back; the experts go on on the CPU."""
    model = placed("demo", 20)
    device = device_of(model)
    model.close()
    assert device.memory().free_bytes == device.memory().total_bytes
    assert model.generate(PROMPT, **GREEDY) == text
    assert "given up" in str(model.report().placement)


def test_interrupting_generation_leaves_the_model_usable(text: str) -> None:
    """Ctrl-C in the middle of an answer, again and again: the next answer is right."""
    model = placed("demo", 20)
    for limit in (1, 2, 5, 11):
        told: list[str] = []

        def stop(piece: str, told: list[str] = told, limit: int = limit) -> None:
            told.append(piece)
            if len(told) == limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, on_text=stop, **GREEDY)
    assert model.generate(PROMPT, **GREEDY) == text


def test_two_threads_write_what_one_writes(text: str) -> None:
    """Calls from two threads take turns."""
    model = placed("demo", 20)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(model.generate(PROMPT, **GREEDY)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [text, text]


@pytest.mark.parametrize("fault", ["copy", "compute", "memory"])
def test_a_fault_in_the_middle_changes_no_text(fault: Any, text: str, capfd: Any) -> None:
    """The device fails while it writes; the text goes on with the same tokens, and it is said."""
    model = placed("demo", 20)
    device_of(model).fail(fault, 30)
    assert model.generate(PROMPT, **GREEDY) == text
    said = [path.what for path in model.report().slow_paths]
    wanted = "expert slots instead of 20" if fault == "memory" else "all experts on the CPU since"
    assert any(wanted in what for what in said)
    assert wanted in capfd.readouterr().err
    assert model.generate(PROMPT, **GREEDY) == text


def test_attention_without_memory_is_repeated_with_fewer_slots(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation of torch's own fails in the middle of a pass: its cache is cut back."""
    model = placed("demo", 20)
    attention = model.model.get_decoder().layers[3].self_attn
    original, calls = attention.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = original(*args, **kwargs)  # the cache has the token now
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(attention, "forward", forward)
    assert model.generate(PROMPT, **GREEDY) == text
    assert any("15 expert slots instead of 20" in p.what for p in model.report().slow_paths)


def test_a_stalled_device_times_out(text: str) -> None:
    """An event that never comes, as after a suspend, ends the device and not the program."""
    model = placed("demo", 20)
    executor = placement_of(model).executor
    assert executor is not None
    executor._timeout_s = 0.3
    device_of(model).fail("stall", 20)
    assert model.generate(PROMPT, **GREEDY) == text
    assert any("did not finish in" in path.reason for path in model.report().slow_paths)


def test_too_little_vram_says_how_much_is_needed(tiny_model: Path) -> None:
    """The dense part alone needs more: the message has both sizes."""
    with pytest.raises(UsageError, match=r"VRAM is short by .*, 1\.0 MiB are there") as caught:
        HybridModel.from_pretrained(tiny_model, vram=1 << 20, threads=1)
    enough = re.search(r"give it vram of ([\d.]+ MiB) or more", str(caught.value.hint))
    assert enough
    model = HybridModel.from_pretrained(tiny_model, vram=enough[1], threads=1)
    assert placement_of(model).fit.fits


def test_too_little_ram_says_so(tiny_model: Path) -> None:
    """RAM is named with both sizes and its own remedy; what VRAM lacks nothing of is not."""
    with pytest.raises(UsageError, match=r"RAM is short by .*2\.00 GiB .*1024\.0 MiB") as caught:
        HybridModel.from_pretrained(tiny_model, vram="4GiB", ram="1GiB", threads=1)
    assert "VRAM" not in caught.value.message
    hint = str(caught.value.hint)
    assert hint == (
        "give it ram of 2.00 GiB or more, or leave ram out to use all that this machine has"
    )


def test_an_emulated_device_reserves_nothing_for_a_driver(text: str) -> None:
    """64 MiB hold the whole demo model, as it has no driver beside it; the text is the CPU's."""
    model = HybridModel.from_pretrained("demo", vram="64MiB", threads=1)
    placed = placement_of(model).fit
    assert sum(placed.slots) == 96
    assert not any("driver" in item.name for item in placed.items)
    assert model.generate(PROMPT, **GREEDY) == text


class Card:
    """A GPU as far as its memory goes."""

    name = "a card"

    def __init__(self, total: float, free: float) -> None:
        self._memory = Memory(int(total * 2**30), int(free * 2**30))

    def memory(self) -> Memory:
        return self._memory


def usable(card: Card, vram: float | None) -> float:
    """GiB that may be used of a card when so many are asked for."""
    asked = None if vram is None else int(vram * 2**30)
    hardware = find_hardware("rtx4060-laptop-8gb")
    return usable_vram(cast("Device", card), hardware, Budget(asked, None, 256)) / 2**30


def test_a_drivers_context_is_not_reserved_twice() -> None:
    """It is missing in the free memory and part of what is asked for: all of a card is all of it.

    What is left for a model never exceeds what is free less what is loaded later.
    """
    context = CONTEXT_BYTES / 2**30
    fresh = Card(3.94, 3.94 - context)  # sold as one of 4 GiB
    assert usable(fresh, None) == usable(fresh, 4) == pytest.approx(3.94)
    assert usable(fresh, 3.94) == pytest.approx(3.94)
    assert usable(fresh, 2) == 2
    heavy = Card(3.94, 3.94 - context - 0.1)  # a context larger than is assumed
    assert usable(heavy, None) == usable(heavy, 4) == pytest.approx(3.84)
    shared = Card(3.94, 2)
    assert usable(shared, None) == pytest.approx(2 + context)
    with pytest.raises(UsageError, match=r"vram is 4\.00 GiB, a card has 2\.00 GiB free"):
        usable(shared, 4)
    with pytest.raises(UsageError, match=r"vram is 5\.00 GiB, a card has 3\.94 GiB"):
        usable(fresh, 5)


def test_more_vram_than_the_device_has_is_refused(tiny_model: Path) -> None:
    """Both sizes and the remedy."""
    model, _ = load_fast_model(tiny_model, fast=False)
    layer = next(m.hybrid_experts for m in model.modules() if hasattr(m, "hybrid_experts"))
    device = emulated_device(1 << 30, layer.shape, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    with pytest.raises(UsageError, match=r"vram is 2\.00 GiB, emulated, exact has 1024\.0 MiB"):
        place_model(model, device, hardware, Budget(2 << 30, None, 256), threads=1)


@pytest.mark.parametrize(
    ("name", "vram", "expected"),
    [
        (None, None, None),
        (None, "auto", None),
        (None, 0, None),
        (None, "0", None),
        ("cpu", None, None),
        (None, "4GiB", "emulated"),
        ("emulated", None, "emulated"),
    ],
)
def test_what_runs_where_without_a_gpu(
    name: str | None, vram: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU alone unless vram or the device is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(name, vram) == expected


@pytest.mark.parametrize(
    ("name", "vram"),
    [("gpu", None), ("cuda:x", None), ("cuda", None), ("emulated", 0), ("cpu", "4GiB")],
)
def test_devices_that_cannot_be_are_refused(
    name: str, vram: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error with a hint each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        choose_device(name, vram)
    assert caught.value.hint


def test_the_command_line_shares_and_writes_a_timeline(tmp_path: Path, capfd: Any) -> None:
    """``hybrid run --vram --perfetto --report``: text on stdout, the rest on stderr, a file."""
    file = tmp_path / "lanes.json"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB", "--report"]
    assert main([*words, "--perfetto", str(file)]) == 0
    said = capfd.readouterr()
    assert "experts can be resident" in said.err
    assert "slots are shared equally" in said.err
    assert "predicted" in said.err
    assert str(file) in said.err
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"cpu", "gpu"}
    assert main([*words, "--perfetto", str(file)]) == 2
    assert "exists already" in capfd.readouterr().err


def test_the_command_line_tells_what_becomes_of_ram(capfd: Any) -> None:
    """Pinned where there is plenty, file-backed and read from disk where there is not, each time
    in a line of its own and in the report."""
    words = ["run", "-p", "import os", "-n", "2", "--greedy", "--vram", "612MiB", "--report"]
    for ram, told in (("3GiB", "pinned, 100%"), ("2GiB", "file-backed, 0%")):
        assert main([*words, "--ram", ram]) == 0
        said = capfd.readouterr().err
        size = ram.replace("GiB", ".00 GiB")
        assert re.search(rf"^hybrid: RAM, {size}: .*experts are {told} of them", said, re.M)
        assert re.search(rf"^device .*RAM, {size}: .*experts are {told} of them", said, re.M)


def test_a_session_begins_with_what_the_last_one_used(tmp_path: Path, capfd: Any) -> None:
    """``--popularity``: written at the end, added to by the next session, which starts warm."""
    file = tmp_path / "uses.json"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB"]
    counted = []
    for _ in range(2):
        assert main([*words, "--popularity", str(file)]) == 0
        assert str(file) in capfd.readouterr().err
        counted.append(json.loads(file.read_text())["tokens"])
    assert counted[1] == 2 * counted[0] > 0
    model = placed("demo", 24, popularity=file)
    executor = placement_of(model).executor
    assert executor is not None
    cache = executor.director.cache
    assert sum(len(cache.residency(layer)) for layer in range(6)) == 24
    assert main(["run", "-p", "x", "--popularity", str(file)]) == 2
    assert "on the CPU alone" in capfd.readouterr().err


def test_a_recorded_routing_is_what_the_planner_replays(tmp_path: Path, capfd: Any) -> None:
    """``--routing``: a trace of the session, which a dry run and a warm start both take."""
    file = tmp_path / "mine.npz"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB"]
    assert main([*words, "--routing", str(file)]) == 0
    assert str(file) in capfd.readouterr().err
    ids, weights = read_trace(file)
    assert ids.shape == weights.shape
    assert ids.shape[1:] == (6, 4)
    assert ids.max() < 16
    model = placed("demo", 24, popularity=file)
    assert placement_of(model).popularity is not None
    dry = plan("demo", vram=placement_of(model).fit.vram_bytes, popularity=file, context=256)
    assert dry.fit == placement_of(model).fit
    assert "how their experts were used before" in placement_of(model).decision[0]
    assert main([*words, "--routing", str(file)]) == 2
    assert "exists already" in capfd.readouterr().err


def test_a_popularity_file_of_another_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """The message gives both shapes; a missing file is named."""
    file = tmp_path / "uses.json"
    file.write_text(Popularity("other", 3, np.ones((2, 3), np.int64)).to_json())
    with pytest.raises(PlannerError, match=r"\[2, 3\].*\[2, 8\]"):
        HybridModel.from_pretrained(tiny_model, vram="1GiB", popularity=file)
    with pytest.raises(UsageError, match="there is no popularity file"):
        HybridModel.from_pretrained(tiny_model, vram="1GiB", popularity=tmp_path / "none.json")


def test_experts_beyond_memory_are_read_ahead(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """With less RAM than experts the lookahead asks the system for pages; the text is the same."""
    asked: list[tuple[int, list[int]]] = []
    original = ExpertStore.read_ahead

    def read_ahead(self: ExpertStore, layer: int, experts: Any) -> None:
        asked.append((layer, list(experts)))
        original(self, layer, experts)

    monkeypatch.setattr(ExpertStore, "read_ahead", read_ahead)
    model = placed("demo", 20, ram=(2 << 30) + (1 << 20))
    assert placement_of(model).fit.in_ram < 1
    asked.clear()
    assert model.generate(PROMPT, **GREEDY) == text
    assert {layer for layer, _ in asked} == {1, 2, 3, 4, 5}
    assert any(experts for _, experts in asked)


@pytest.mark.parametrize(
    "given",
    [
        {"vram": "11MiB"},
        {"vram": "12MiB"},
        {"vram": 64 << 20},
        {"vram": "5MiB", "context": 128},
        {"vram": "12MiB", "ram": "2GiB"},
        {"vram": "12MiB", "ram": (2 << 30) + (1 << 20)},
        {"vram": "12MiB", "ram": "2.004GiB"},
    ],
)
def test_the_dry_run_places_as_the_runtime_does(given: dict[str, Any]) -> None:
    """The same arguments give the same slots, host memory, shares and formats; no others are
    needed. What both say of it is the same, too."""
    model = HybridModel.from_pretrained("demo", threads=1, **given)
    placement = placement_of(model)
    dry = plan("demo", threads=1, tokens=1, **given)
    assert dry.fit == placement.fit
    assert placement.executor is not None
    assert placement.executor.slot_count == sum(dry.fit.slots)
    assert (dry.request.dense, dry.request.experts) == (
        placement.cost.dense_format,
        placement.cost.expert_format,
    )
    said = dict(tables(dry)[0].rows)
    assert said["GPU"] in placement.decision[0]
    assert said["RAM"] in placement.decision[1]


@pytest.mark.parametrize("formats", [{"dense": "q8_0"}, {"experts": "q8_0", "dense": "bf16"}])
def test_the_dry_run_takes_a_directorys_formats(
    formats: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    """A converted directory is planned in what it holds, an original in what is asked for."""
    converted = convert(tiny_model, tmp_path / "converted", **formats).path
    given: dict[str, Any] = {"vram": "40MiB", "threads": 1}
    placed = placement_of(HybridModel.from_pretrained(converted, **given))
    assert plan(converted, tokens=1, **given).fit == placed.fit
    assert placed.cost.expert_format == formats.get("experts", "q4_0")


@pytest.mark.parametrize("dense", [None, "q8_0", "q4_0"])
def test_the_dry_run_widens_dense_weights_as_a_gpu_does(
    dense: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """On a GPU they are counted alike, whatever the directory holds or is asked for."""
    converted = convert(tiny_model, tmp_path / "converted", dense=dense).path
    hardware = find_hardware("rtx4060-laptop")
    model, _ = load_fast_model(converted, dtype=torch.bfloat16, fast=False)
    there = cost_of(model, hardware, torch.device("cuda")).dense_format
    for planned in (
        plan(converted, hardware, tokens=1),
        plan(tiny_model, hardware, tokens=1, dense=dense),
    ):
        assert planned.request.cost.dense_format == there
        assert planned.request.dense == (dense or "bf16")


def test_the_dry_run_of_the_cpu_alone_is_the_runtimes(tiny_model: Path) -> None:
    """With vram 0, a machine's memory is shared out as loading does it."""
    given: dict[str, Any] = {"vram": 0, "context": 512, "tokens": 1}
    ram = plan(tiny_model, "cpu-only-laptop", **given).fit.used("ram") - 20_000
    found = plan(tiny_model, "cpu-only-laptop", ram=ram, **given).fit
    assert 0 < found.in_ram < 1
    assert found == fitted_alone(load_fast_model(tiny_model)[0], ram, 512)


def test_this_machines_memory_is_that_of_an_emulated_run() -> None:
    """Uncalibrated, too: not the described laptop's, whose GPU is emulated."""
    placed = placement_of(HybridModel.from_pretrained("demo", vram="64MiB", threads=1)).fit
    assert placed.ram_bytes == Identity.of_this_machine(1).ram_bytes


def test_a_timeline_of_the_cpu_alone_is_refused(tmp_path: Path, capfd: Any) -> None:
    """There are no lanes to show; nothing is generated first."""
    words = ["run", "-p", "x", "--perfetto", str(tmp_path / "x.json")]
    assert main(words) == 2
    assert "on the CPU alone" in capfd.readouterr().err
