"""What keeps benchmarks short: the description of a tiny model, and stand-ins for what is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

_SPEC: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}

#: What starting a process gives.
STARTED = {
    "import_s": 3.0,
    "load_s": 1.0,
    "load_to_first_token_s": 1.5,
    "process_to_first_token_s": 4.5,
    "anonymous_before_loading_bytes": 200 << 20,
    "peak_anonymous_bytes": 300 << 20,
}


def write_spec(folder: Path, **changes: Any) -> Path:
    """Write a description of a model for ``--spec``; ``changes`` are keys of its config."""
    path = folder / "tiny.toml"
    config = [f"{key} = {value!r}" for key, value in (_SPEC | changes).items()]
    path.write_text("\n".join(['name = "Tiny"', "[config]", *config, ""]))
    return path


def read_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is read, and no other process is started."""
    monkeypatch.setattr("hybrid.bench.model._READ_BYTES", 1 << 20)
    monkeypatch.setattr("hybrid.bench.model._start", lambda *of: STARTED)
    monkeypatch.setattr("hybrid.bench.model._calibrate", lambda *of: None)
