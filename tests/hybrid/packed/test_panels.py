"""Experts of many tokens through torch's products, beside the kernels and the naive twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

import hybrid.measure.experts
import hybrid.packed.bf16_products
import naive
from cpu_experts import tiles
from cpu_experts.kernels.widen import widen
from hybrid.formats.block import Block, unpack_expert
from hybrid.formats.errors import FormatError, ShapeError
from hybrid.formats.matrix import pack, unpack
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.measure.experts import Budget, layer_times
from hybrid.packed.bf16_products import faster_from, least_load, multiplier, panels_from, run_panels
from hybrid.packed.experts import BareLayer, compute_on_cpu, experts_of
from hybrid.session.model import HybridModel
from hybrid.weights.checkpoint import convert
from planner.describe.checked_table import read_table
from planner.describe.hardware import HardwareSpec, Point, to_toml
from random_experts import random_experts
from rounding import last_place

rng = np.random.default_rng(0)
UNCOMPILED = bool(numba.config.DISABLE_JIT)


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (37, 72), (1, 1), (48, 96)])
def test_widened_matrices_are_what_the_format_says(fmt: str, rows: int, cols: int) -> None:
    """Exactly the numbers that ``unpack`` gives, ragged ends included."""
    packed = pack(rng.standard_normal((rows, cols), dtype=np.float32), fmt)
    out = np.full((-(-rows // 16) * 16, -(-cols // 32) * 32), np.nan, np.float32)
    widen(packed, rows, cols, fmt, out)
    np.testing.assert_array_equal(out[:rows, :cols], unpack(packed, rows, cols, fmt))


def test_wrong_matrices_are_refused() -> None:
    """What would be read or written beyond its end raises."""
    packed, out = pack(np.ones((16, 32), np.float32), "q4_0"), np.zeros((16, 32), np.float32)
    with pytest.raises(FormatError, match="takes uint8"):
        widen(packed[:-1], 16, 32, "q4_0", out)
    with pytest.raises(FormatError, match="of q4_0 or q8_0"):
        widen(packed, 16, 32, "bf16", out)
    with pytest.raises(ShapeError, match="out is"):
        widen(packed, 16, 32, "q4_0", out[:8])


SHAPES = {
    "silu": {},
    "ungated": {"gated": False, "activation": "relu2"},
    "biases": {"bias": True},
    "gpt_oss": {"bias": True, "limit": 1.5, "alpha": 1.702, "up_offset": 1.0},
    "gelu": {"activation": "gelu_tanh"},
}


def _experts(count: int, **changes: Any) -> tuple[Block, np.ndarray]:
    values: dict[str, Any] = {"hidden": 72, "intermediate": 40, "format": "q8_0"}
    shape = Block(**values | changes)
    return shape, random_experts(shape, count)[0]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose matrix units, if any, we do not use ourselves."""
    monkeypatch.setattr(tiles, "available", lambda: False)


@pytest.fixture(params=[False, True], ids=["torch", "tiles"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Both of what multiplies, where there are both."""
    if request.param and not tiles.available():
        pytest.skip("this processor has no AMX, or is told to do without")
    if not request.param:
        request.getfixturevalue("by_torch")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("least", [1, 3, 5, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_experts_by_load_equal_the_twin(name: str, least: int) -> None:
    """Loads of 0, 1 and odd numbers, ids that are elsewhere, on both sides of the threshold.

    The tolerance is 3 % of the largest output: three roundings to 8 bits of mantissa on one side
    (0.4 % each), two to int8 on the other.
    """
    shape, blocks = _experts(6, **SHAPES[name])
    tokens = 7
    ids = torch.tensor([[0, 1], [0, 2], [0, 2], [0, 2], [0, 7], [0, -1], [3, 0]])
    x = torch.from_numpy(rng.standard_normal((tokens, 72), dtype=np.float32))
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    packed = [unpack_expert(shape, block[: shape.block_bytes].copy()) for block in blocks]
    wanted = naive.experts(shape, packed, x.numpy(), ids.numpy(), weights.numpy())
    found = compute_on_cpu(x, ids, weights, BareLayer(blocks, shape, least))
    np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())
    out = np.zeros(x.shape, np.float32)
    left = run_panels(x.numpy(), ids.numpy(), weights.numpy(), blocks, shape, least, out)
    loads = {0: 7, 1: 1, 2: 3, 3: 1, 7: 1, -1: 1}
    for expert, load in loads.items():
        done = load >= least and 0 <= expert < 6
        assert bool((left[ids.numpy() == expert] == -1).all()) == (done or expert == -1)
    assert bool(out.any()) == (least <= 7)


def test_no_tokens() -> None:
    """Nothing in, nothing out."""
    shape, blocks = _experts(2)
    none = torch.zeros(0, 2)
    found = compute_on_cpu(torch.zeros(0, 72), none.long(), none, BareLayer(blocks, shape, 1))
    assert found.shape == (0, 72)


@pytest.mark.usefixtures("by_torch")
def test_memory_is_that_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of experts is computed in the memory of the largest matrix."""
    memory = hybrid.packed.bf16_products._Memory()
    monkeypatch.setattr(hybrid.packed.bf16_products, "_MEMORY", memory)
    shape, blocks = _experts(9, hidden=64, intermediate=64)
    layer, ids = BareLayer(blocks, shape, 1), torch.arange(9)[:, None].repeat(3, 1)
    x, ones = torch.ones(27, 64), torch.ones(27, 1)
    compute_on_cpu(x, ids, ones, layer)
    held = memory._floats.ctypes.data, memory._halves.ctypes.data
    compute_on_cpu(x, ids, ones, layer)
    assert held == (memory._floats.ctypes.data, memory._halves.ctypes.data)
    assert memory._floats.size == memory._halves.size == 2 * 64 * 64


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("name", ["silu", "biases"])
def test_large_matrices_and_long_prompts_take_bounded_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and few tokens at a time give what all at once do, ragged ends included.

    A product's sum may be made in another order then, and an activation and the output be rounded
    to their neighbours.
    """
    shape, blocks = _experts(2, **SHAPES[name])
    layer, ids = BareLayer(blocks, shape, 1), torch.zeros(7, 1, dtype=torch.int64)
    x = torch.from_numpy(rng.standard_normal((7, 72), dtype=np.float32))
    wanted = compute_on_cpu(x, ids, torch.ones(7, 1), layer)
    memory, tokens = hybrid.packed.bf16_products._Memory(), []
    expert = hybrid.packed.bf16_products._expert

    def counted(layout: Any, block: Any, x: torch.Tensor) -> torch.Tensor:
        tokens.append(len(x))
        return expert(layout, block, x)

    monkeypatch.setattr(hybrid.packed.bf16_products, "_MEMORY", memory)
    monkeypatch.setattr(hybrid.packed.bf16_products, "_WEIGHTS", 32 * 96)  # of 96 and of 80 rows
    monkeypatch.setattr(hybrid.packed.bf16_products, "_TOKENS", 3)
    monkeypatch.setattr(hybrid.packed.bf16_products, "_expert", counted)
    found = compute_on_cpu(x, ids, torch.ones(7, 1), layer)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * last_place(wanted))
    assert tokens == [3, 3, 1]
    assert memory._floats.size == 32 * 96


@pytest.mark.usefixtures("by_torch")
def test_memory_outlives_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was allocated in inference mode is written outside of it, and the other way round."""
    monkeypatch.setattr(
        hybrid.packed.bf16_products, "_MEMORY", hybrid.packed.bf16_products._Memory()
    )
    shape, blocks = _experts(2)
    step = torch.ones(3, 72), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    layer = BareLayer(blocks, shape, 1)
    with torch.inference_mode():
        inside = compute_on_cpu(*step, layer)
    outside = compute_on_cpu(*step, layer)
    with torch.inference_mode():
        assert torch.equal(compute_on_cpu(*step, layer), outside)
    assert torch.equal(inside, outside)


def test_the_least_load() -> None:
    """From there on panels win everywhere; one load where they lose ends it."""
    kernels = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}
    assert least_load(kernels, {1: 5.0, 2: 5.0, 4: 5.0, 8: 5.0, 16: 5.0}) == 8
    assert least_load(kernels, {1: 5.0, 2: 1.0, 4: 5.0, 8: 8.0, 16: 5.0}) == 8
    assert least_load(kernels, {1: 0.5, 2: 0.5, 4: 0.5, 8: 0.5}) == 1
    assert least_load(kernels, {16: 16.5, 8: 1.0}) is None
    assert least_load(kernels, {}) is None


@pytest.fixture
def units(bf16_units: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A processor that has them, and a machine without a calibration."""
    bf16_units("amx")
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))


def _spec(shape: Block) -> HardwareSpec:
    file = Path(__file__).parents[3] / "configs" / "hardware"
    base = HardwareSpec.from_table(read_table(sorted(file.glob("*.toml"))[0]), "shipped")
    seconds = {"cpu": {1: 1.0, 2: 2.0, 4: 3.0}, "panels": {1: 3.0, 2: 2.5, 4: 3.0}}
    points = tuple(
        Point(
            lane=lane,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            format=shape.format,
            load=load,
            seconds=value,
        )
        for lane, values in seconds.items()
        for load, value in values.items()
    )
    return HardwareSpec(**vars(base) | {"points": points})


@pytest.mark.usefixtures("units")
def test_a_calibration_decides(tiny_model: Path, tmp_path: Path) -> None:
    """Its points survive the file, and every way to load a model finds them; the report says."""
    convert(tiny_model, tmp_path / "model", experts="q8_0")
    model = HybridModel.from_pretrained(tmp_path / "model")
    assert f"nothing measured found {multiplier()} faster" in str(model.report())
    experts = experts_of(model.model)[0]
    spec = _spec(experts.shape)
    assert faster_from(spec, experts.shape) == 4
    assert experts.panels_from is None
    threads = torch.get_num_threads()
    calibrations.save(spec, Identity.of_this_machine(threads))
    assert "panels" in to_toml(spec)
    again = HybridModel.from_pretrained(tmp_path / "model", threads=threads)
    assert experts_of(again.model)[0].panels_from == 4
    assert f"{multiplier()} from 4 tokens on (measured)" in str(again.report())
    prompt = 4 * [5, 9, 33, 21, 7, 80, 2, 4, 4, 4, 4, 4]  # more than a step has
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found, wanted = (torch.cat(m.generate(prompt, **options).logits) for m in (again, model))
    assert not torch.equal(found[0], wanted[0])  # the panels were in use
    assert (found[0] - wanted[0]).norm() < 0.05 * wanted[0].norm()


@pytest.mark.skipif(UNCOMPILED, reason="minutes in plain Python")
def test_calibrating_measures_both(units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is offered, every load is measured in both ways, else in one."""
    shape, blocks = _experts(4, hidden=32, intermediate=32)
    both = layer_times([blocks], shape, 2, Budget(math.inf))
    assert {1, *both.panels} == both.loads.keys() >= {1, 2, 512}
    assert 1 not in both.panels, "a single token never takes them"
    monkeypatch.setattr(hybrid.measure.experts, "offered", lambda shape: False)
    one = layer_times([blocks], shape, 2, Budget(math.inf))
    assert one.panels == {}
    assert one.panels_from() is None


class _Apart:
    """Experts whose family's own code gates between the projections."""

    own_gating = True

    def __call__(self, hidden: Any, expert_ids: Any, routing_weights: Any) -> None:
        """Whatever they compute, panels do not."""


def test_gating_of_a_familys_own_takes_none(units: None) -> None:
    """What panels would take there is not measured: they are never used."""
    shape, blocks = _experts(4, hidden=32, intermediate=32)
    runs: Any = [_Apart()]
    found = layer_times([blocks], shape, 2, Budget(math.inf), runs)
    assert found.loads.keys() >= {1, 2, 512}
    assert found.panels == {}


def test_without_units_it_is_never(
    bf16_units: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is even looked for."""
    bf16_units()
    monkeypatch.setattr(calibrations, "load", lambda identity: pytest.fail("asked"))
    assert panels_from(Block(hidden=32, intermediate=32, format="q4_0")) is None
