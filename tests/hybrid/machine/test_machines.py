"""How much of a machine's memory may be used: one rule for plans and for runs."""

from __future__ import annotations

import pytest

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware
from hybrid.ask.options import Options
from hybrid.errors import UsageError
from hybrid.machine import calibrations
from hybrid.machine.machines import Machine

GIB = 2**30


@pytest.mark.parametrize("asked", [0, 1 << 20, 6 * GIB, 8 * GIB])
@pytest.mark.parametrize("ram_bytes", [None, 4 * GIB])
def test_a_plan_takes_the_memory_that_a_run_takes(asked: int, ram_bytes: int | None) -> None:
    """A card that nothing else uses is the one that its description is about."""
    machine = Machine(find_hardware("rtx4060-laptop"))
    gpu = machine.spec.gpu
    assert gpu is not None
    whole = int(gpu.vram_bytes.value)
    planned = machine.within(asked, ram_bytes)
    assert planned == machine.within(asked, ram_bytes, (gpu.name, (whole, whole)))
    if asked:
        assert planned.spec.gpu is not None
        assert planned.spec.gpu.vram_bytes.value == min(asked, whole)
    else:
        assert (planned.spec.gpu, planned.spec.link) == (None, None)


def test_more_than_there_is_is_refused_alike() -> None:
    """With both sizes; an emulated GPU has as much as is asked for, a machine without one none."""
    machine = Machine(find_hardware("rtx4060-laptop"))
    for device in (None, ("a card", (8 * GIB, 8 * GIB))):
        with pytest.raises(UsageError, match=r"vram is 9\.00 GiB, .* has 8\.00 GiB"):
            machine.within(9 * GIB, None, device)
    emulated = Machine(machine.spec, emulated=True)
    assert emulated.within(9 * GIB, None).spec.gpu is not None
    assert not emulated.within(0, None).emulated


def test_the_device_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that was measured unless the CPU alone or an emulated one is."""
    card, cpu = find_hardware("rtx4060-laptop"), find_hardware("cpu-only-laptop")
    monkeypatch.setattr(calibrations, "in_force", lambda threads: (card, "RTX 4060 (cuda:0)"))
    monkeypatch.setattr(calibrations, "alone", lambda *_: cpu)
    demo = find_model("demo")
    for options, expected in (
        (Options(), (card.name, False)),
        (Options(vram_bytes=GIB), (card.name, False)),
        (Options(vram_bytes=0), (cpu.name, False)),
        (Options(device="cpu"), (cpu.name, False)),
        (Options(device="emulated"), (f"{cpu.name} with the GPU of {card.name}", True)),
    ):
        machine = Machine.find(demo, options)
        assert machine is not None
        assert (machine.spec.name, machine.emulated) == expected
