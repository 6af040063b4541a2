"""What a model may use of a device and of memory, and which device that is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_experts.device import Memory
from hybrid.ask.names import find_hardware
from hybrid.ask.options import Options
from hybrid.errors import UsageError
from hybrid.loading import load_fast_model
from hybrid.machine.devices import choose_device, open_device
from hybrid.machine.machines import Machine
from hybrid.model import Model
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import Budget
from hybrid.sharing.placement import place_model
from planner.describe.hardware import CONTEXT_BYTES
from shared_demo import GREEDY, PROMPT, placement_of


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


def test_an_emulated_device_reserves_nothing_for_a_driver(demo_text: str) -> None:
    """64 MiB hold the whole demo model, as it has no driver beside it; the text is the CPU's."""
    model = HybridModel.from_pretrained("demo", vram="64MiB", threads=1)
    placed = placement_of(model).fit
    assert sum(placed.slots) == 96
    assert not any("driver" in item.name for item in placed.items)
    assert model.generate(PROMPT, **GREEDY) == demo_text


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
    machine = Machine(find_hardware("rtx4060-laptop-8gb"))
    spec = machine.within(asked, None, (card.name, card.memory())).spec
    assert spec.gpu is not None
    return spec.gpu.vram_bytes.value / 2**30


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
    device = open_device("emulated", 1 << 30, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    with pytest.raises(UsageError, match=r"vram is 2\.00 GiB, emulated, exact has 1024\.0 MiB"):
        place_model(Model(model), device, hardware, Budget(2 << 30, None, 256), threads=1)


def chosen(name: str | None, vram: Any) -> str | None:
    """The device that a run takes for what a user writes."""
    options = Options.of(device=name, vram=vram)
    return choose_device(options.device, options.vram_bytes)


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
    assert chosen(name, vram) == expected


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
        chosen(name, vram)
    assert caught.value.hint
