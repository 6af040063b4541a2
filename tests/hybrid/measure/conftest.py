"""A machine that was calibrated with a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_experts.emulated import EMULATED
from hybrid.cli import main
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from planner.describe.hardware import HardwareSpec


@pytest.fixture
def measured(quick: Path, tiny_model: Path) -> HardwareSpec:
    """The tiny model on an emulated device, as the command measures it on this processor."""
    words = ["calibrate", str(tiny_model), "--device", "emulated", "--threads", "1"]
    assert main(words) == 0
    spec = calibrations.load(Identity.of_this_machine(1, EMULATED.calibrated_as))
    assert spec is not None
    return spec
