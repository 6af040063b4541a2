"""The small model that plans are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner_examples import save_config


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The directory of the small model's config.json."""
    return save_config(tmp_path / "small-moe")
