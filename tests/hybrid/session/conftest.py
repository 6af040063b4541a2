"""The model that tests of a session share."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid.session.model import HybridModel


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> HybridModel:
    return HybridModel.from_pretrained(tiny_model, threads=1)
