"""A tiny model without the experts' rounding, for tests of the loop around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fast_models import converted, open_model


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A converted model with the fast path, as transformers loads it."""
    folder: Path = converted("qwen3_moe", tmp_path_factory.mktemp("qwen"))
    return open_model(folder)
