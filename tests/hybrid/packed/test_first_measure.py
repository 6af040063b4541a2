"""When products in bfloat16 are taken: measured once, kept for the machine, in bfloat16 only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpu_experts import tiles
from hybrid.formats.block import Block
from hybrid.formats.matrix import pack
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.packed import dense, first_measure
from hybrid.packed.dense import PackedMlp, QuantizedLinear
from hybrid.packed.first_measure import least_tokens, panels_of
from planner.describe.hardware import PANELS, Point
from planner_examples import bare_machine
from random_experts import random_experts

SHAPE = Block(hidden=64, intermediate=32, format="q4_0")


@pytest.fixture
def machine(
    bf16_units: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[str]:
    """A machine with units for bfloat16 where nothing was measured; what is measured from now."""
    bf16_units("bf16")
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    measured: list[str] = []

    def measure(fmt: str) -> int | None:
        measured.append(fmt)
        return {"q4_0": 32, "bf16": 8}.get(fmt)

    monkeypatch.setattr(first_measure, "_measure", measure)
    first_measure._kept.cache_clear()
    return measured


def _later_start() -> None:
    first_measure._kept.cache_clear()


def test_it_is_measured_once_a_machine(machine: list[str], tmp_path: Path) -> None:
    """Every format by itself; "never" is kept, too."""
    for _ in range(2):
        assert [least_tokens(fmt) for fmt in ("q4_0", "bf16", "q8_0")] == [32, 8, None]
        _later_start()
    assert machine == ["q4_0", "bf16", "q8_0"]
    (file,) = tmp_path.rglob("*.products.json")
    assert json.loads(file.read_text()) == {"q4_0": 32, "bf16": 8, "q8_0": None}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[3]", b'{"q4_0": "soon"}', b"\xff\xfe", b"[" * 99999]
)
def test_a_damaged_file_is_made_anew(machine: list[str], tmp_path: Path, content: bytes) -> None:
    """It can be made again in a second, so nobody needs to hear of it."""
    least_tokens("q4_0")
    (file,) = tmp_path.rglob("*.products.json")
    file.write_bytes(content)
    _later_start()
    assert least_tokens("q4_0") == 32
    assert machine == ["q4_0", "q4_0"]
    assert json.loads(file.read_text()) == {"q4_0": 32}


def test_a_folder_that_cannot_be_written(
    machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then it is measured at every start."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "file" / "below"))
    assert least_tokens("q4_0") == 32
    _later_start()
    assert least_tokens("q4_0") == 32
    assert machine == ["q4_0", "q4_0"]


def test_without_units_nothing_is_measured(
    machine: list[str], bf16_units: Callable[..., None]
) -> None:
    """Nor for formats that are not widened."""
    assert least_tokens("f32") is None
    bf16_units()
    assert least_tokens("q4_0") is None
    assert machine == []


def test_a_calibration_knows_its_experts_better(machine: list[str]) -> None:
    """Of the shapes that it measured; in float32 nothing else counts."""
    assert panels_of(SHAPE, torch.bfloat16) == 32
    assert panels_of(SHAPE, torch.float32) is None
    points = tuple(
        Point(lane=lane, hidden=64, intermediate=32, format="q4_0", load=load, seconds=seconds)
        for lane, load, seconds in (
            ("cpu", 4, 1.0),
            ("cpu", 8, 2.0),
            (PANELS, 4, 0.5),
            (PANELS, 8, 1.0),
        )
    )
    spec = replace(bare_machine(), points=points)
    calibrations.save(spec, Identity.of_this_machine(torch.get_num_threads()))
    assert panels_of(SHAPE, torch.bfloat16) == 4
    assert panels_of(SHAPE, torch.float32) == 4
    other = replace(SHAPE, hidden=96)
    assert panels_of(other, torch.bfloat16) == 32
    assert panels_of(other, torch.float32) is None


@pytest.mark.parametrize("fmt", ["q4_0", "bf16"])
def test_dense_layers_take_them(
    machine: list[str], monkeypatch: pytest.MonkeyPatch, fmt: str
) -> None:
    """From so many tokens on, where activations are bfloat16 anyway, with the same outcome."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).numpy()
    layer = QuantizedLinear(48, 64, fmt, torch.nn.Parameter(torch.arange(48.0)))
    layer.packed = torch.nn.Parameter(torch.from_numpy(pack(weight, fmt)), requires_grad=False)
    layer.eval()
    calls: list[int] = []
    multiply = dense.multiply

    def counted(x: torch.Tensor, *others: object) -> torch.Tensor:
        calls.append(len(x))
        return multiply(x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(dense, "multiply", counted)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        for tokens in (1, 4, 32, 40):
            some = x[:, :tokens].bfloat16()
            found = layer(some)
            assert found.dtype == torch.bfloat16
            error = (found.double() - exact[:, :tokens]).abs().max() / exact.abs().max()
            assert error < 0.01
        assert calls == [32, 40]
        layer(x)
    assert len(calls) == 2, "activations in float32 are not rounded"


def test_both_sides_of_a_gated_mlp_count(
    machine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose down side is in a format that is not widened here stays with the kernels."""
    monkeypatch.setattr(tiles, "available", lambda: False)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    outputs = []
    for down in ("q6_k", "bf16"):
        shape = Block(hidden=64, intermediate=32, format="q4_0", down_format=down)
        blocks, _ = random_experts(shape, 1)
        block = torch.from_numpy(blocks[0, : shape.block_bytes].copy())
        with torch.no_grad():
            outputs.append(PackedMlp(block, shape).eval()(x).float())
    error = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    assert error < 0.05
    assert least_tokens("q4_0", "q6_k") is None
    assert least_tokens("q4_0", "bf16") == 32
    assert machine == ["q4_0", "bf16"]


def test_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the numbers that were tried, or never."""
    monkeypatch.setattr(first_measure, "_TOKENS", (4, 8))
    monkeypatch.setattr(first_measure, "_ROWS", 32)
    monkeypatch.setattr(first_measure, "_COLS", 64)
    monkeypatch.setattr(first_measure, "_TURNS", 1)
    for fmt in ("q4_0", "q8_0", "bf16"):
        assert first_measure._measure(fmt) in (None, 4, 8)
