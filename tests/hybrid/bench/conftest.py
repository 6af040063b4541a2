"""What tests of several benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid.bench.model import read_spec
from small_bench import write_spec


@pytest.fixture
def shared_spec(quick: Path) -> Path:
    """A description of a tiny model with a shared expert, a cache folder of its own beside it."""
    return write_spec(quick, model_type="qwen2_moe", shared_expert_intermediate_size=32)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """The ``config.json`` of a tiny Qwen3-MoE of two layers."""
    sizes = {"num_hidden_layers": 5, "num_experts": 4, "max_position_embeddings": 1024}
    path = write_spec(tmp_path, head_dim=16, vocab_size=96, **sizes)
    return read_spec(path, 2)[1]
