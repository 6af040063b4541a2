"""What tests of several rooms of hybrid share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_machine import calm


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Little memory, a short file, short prompts, a cache folder of its own, nobody else."""
    from hybrid.measure import calibrate, experts

    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(experts, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(experts, "_DISK_BYTES", 1 << 22)
    monkeypatch.setattr("hybrid.measure.interference.system_times", calm)
    monkeypatch.setattr(experts, "LOADS", (1, 2, 4))
    monkeypatch.setattr(calibrate, "PROMPTS", (2, 8))
    monkeypatch.setattr(calibrate, "DECODED_AFTER", (8,))
    monkeypatch.setattr(calibrate, "DECODED", 12)
    monkeypatch.setattr(calibrate, "TURNS", (2, 2))
    return tmp_path
