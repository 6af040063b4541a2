"""What tests of several benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_bench import write_spec


@pytest.fixture
def shared_spec(quick: Path) -> Path:
    """A description of a tiny model with a shared expert, a cache folder of its own beside it."""
    return write_spec(quick, model_type="qwen2_moe", shared_expert_intermediate_size=32)
