"""A small model and machine with round numbers, for tests of the planner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid.cli import main
from planner.describe.families import from_hf_config
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec

LAPTOP = ("--hardware", "rtx4060-laptop")
QUICK = ("--tokens", "2", "--prompt", "16", "--context", "64")
"""Options of a machine, and of a plan that takes no time."""

SMALL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 6,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def small_model(**changes: Any) -> ModelSpec:
    """Six layers of 16 experts, 4 per token."""
    return from_hf_config({**SMALL, **changes}, "small")


def quantity(value: float, error: float | None = None) -> dict[str, Any]:
    """A number as a hardware file states it."""
    entry = {"value": value, "source": "analytic", "from": "a round number"}
    return entry if error is None else {**entry, "error": error}


def machine_table(**parts: Any) -> dict[str, Any]:
    """A machine of round rates at full efficiency: 100 GB/s VRAM, 10 GB/s RAM, 1 GB/s link."""
    table = {
        "name": "round",
        "gpu": {
            "name": "gpu",
            "vram_bytes": quantity(2 * 2**30),
            "memory_bytes_per_s": quantity(100e9),
            "flop_per_s": quantity(10e12),
            "memory_efficiency": quantity(1.0),
            "flop_efficiency": quantity(1.0),
            "launch_s": quantity(0.0),
        },
        "cpu": {
            "name": "cpu",
            "ram_bytes": quantity(16 * 2**30),
            "memory_bytes_per_s": quantity(10e9, 0.1),
            "flop_per_s": quantity(100e9),
            "memory_efficiency": quantity(1.0),
            "flop_efficiency": quantity(1.0),
            "start_s": quantity(1e-5),
            "layer_overhead_s": quantity(0.0),
        },
        "link": {
            "bytes_per_s": quantity(1e9),
            "latency_s": quantity(1e-6),
            "cpu_slowdown": quantity(1.0),
        },
        "disk": {"bytes_per_s": quantity(1e8), "latency_s": quantity(1e-4)},
    }
    return {key: value for key, value in {**table, **parts}.items() if value is not None}


def machine(**parts: Any) -> HardwareSpec:
    """``machine_table`` as a spec."""
    return HardwareSpec.from_table(machine_table(**parts), "round.toml")


def bare_machine() -> HardwareSpec:
    """The same machine without its GPU."""
    return machine(gpu=None, link=None)


def save_config(folder: Path) -> Path:
    """Write the small model's config.json into a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def hybrid_plan(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run ``hybrid plan`` in this process; return exit code, stdout and stderr."""
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
