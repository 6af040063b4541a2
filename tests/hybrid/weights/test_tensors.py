"""A checkpoint's tensors: those that nobody takes, and values that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import read_weights, write_weights
from hybrid.errors import CheckpointError
from hybrid.weights.checkpoint import check, convert


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({}, None),
        (
            {f"mtp.layers.0.mlp.experts.{e}.up_proj.weight": (32, 64) for e in range(4)},
            "not used: 4 tensors, 16.0 KiB, which the model does not take: mtp (4)",
        ),
        (
            {"model.layers.2.eh_proj.weight": (64, 128), "model.visual.a.weight": (2, 2)},
            "not used: 2 tensors, 16.1 KiB, which the model does not take: "
            "model.layers.2, model.visual",
        ),
        (
            {"model.layers.0.mlp.experts.0.up_proj.weight_2": (4,)},
            "not used: 1 tensor, 0.1 KiB, which the model does not take: "
            "model.layers.0.mlp.experts.0.up_proj.weight_2",
        ),
        (
            {f"model.layers.{n}.self_attn.sinks": (4,) for n in (0, 1)}
            | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)},
            "not used: 2 tensors, 0.1 KiB, which the model does not take: "
            "model.layers.*.self_attn.sinks (2)",
        ),
    ],
)
def test_tensors_that_nobody_takes(
    src: Path, extra: dict[str, tuple[int, ...]], told: str | None
) -> None:
    """They are told once, by what they have in common, with their size."""
    more = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in extra.items()}
    write_weights(src, read_weights(src) | more)
    found = check(src)
    assert found.errors == []
    assert found.notes == ([] if told is None else [told])


def put(src: Path, **values: float) -> None:
    """Write values into single elements of layer 1: ``e5_up_proj=nan``."""
    weights = read_weights(src)
    for where, value in values.items():
        expert, matrix = where.split("_", 1)
        weights[f"model.layers.1.mlp.experts.{expert[1:]}.{matrix}.weight"].view(-1)[3] = value
    write_weights(src, weights)


@pytest.mark.parametrize("experts", ["q4_0", "f32"])
def test_all_values_that_are_not_finite(src: Path, tmp_path: Path, experts: str) -> None:
    """Layer, expert, matrix and number of every one are in the one error."""
    put(src, e2_down_proj=float("inf"), e5_gate_proj=float("nan"), e5_up_proj=-float("inf"))
    with pytest.raises(CheckpointError) as caught:
        convert(src, tmp_path / "dst", experts=experts)
    layer = "model.layers.1.mlp.experts"
    assert caught.value.message == (
        f"3 matrices of experts hold inf or NaN: {layer}, expert 2, down_proj (1), "
        f"{layer}, expert 5, gate_proj (1), {layer}, expert 5, up_proj (1)"
    )
    assert check(src).errors == []  # cheap: reads no weight
    (error,) = check(src, verify=True).errors
    assert str(error) == str(caught.value)


def test_expert_of_zeros(src: Path, tmp_path: Path) -> None:
    """It is as good as any other."""
    weights = read_weights(src)
    for key in weights:
        if ".experts.3." in key:
            weights[key].zero_()
    write_weights(src, weights)
    assert check(src, verify=True).errors == []
    convert(src, tmp_path / "dst", verify=True)


def test_dense_tensors_with_nan(src: Path) -> None:
    """``check --verify`` names all of them."""
    weights = read_weights(src)
    for key in ("model.norm.weight", "lm_head.weight"):
        weights[key].view(-1)[0] = float("nan")
    write_weights(src, weights)
    (error,) = check(src, verify=True).errors
    assert "lm_head.weight holds NaN; model.norm.weight holds NaN" in error.message
