"""A model to change, for the tests of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def src(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "src")
