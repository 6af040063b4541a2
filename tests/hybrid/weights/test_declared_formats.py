"""The format of a checkpoint, wherever it is declared: read, or refused by its right name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import WEIGHTS, edit_config, read_weights, refused, write_json, write_weights
from hybrid.errors import UnsupportedModelError
from hybrid.weights.checks import Checkpoint, check_files
from hybrid.weights.declared_formats import check_format


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            "compressed-tensors (marlin-24, 4 bits)",
        ),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "awq (3 bits, groups of 128)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt (W4A8_AWQ)"),
        ({"quant_method": "hqq", "nbits": 4}, "hqq"),
        (
            {"bits": 4, "group_size": 64},
            "quantized in a way that it does not name (4 bits, groups of 64)",
        ),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["on top", "of the text model"])
def test_declared_in_the_config(
    src: Path, settings: dict[str, Any], named: str, inside: bool
) -> None:
    """A format that cannot be read is refused by its own name and its numbers."""
    table = {"quantization_config": settings}
    edit_config(src, **({"text_config": table} if inside else table))
    error = refused(src)
    assert isinstance(error, UnsupportedModelError)
    assert named in error.message
    assert "None" not in str(error)
    read = "bf16, f16 or f32, fp8, mxfp8, mxfp4 or nvfp4, int4 of compressed-tensors, AWQ or GPTQ"
    assert read in str(error)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "NVFP4", "group_size": 16}},
            "NVFP4 (groups of 16), says hf_quant_config.json: its weight files hold no such",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 32}, "4 bits, groups of 32"),
        ("quant_config.json", {"quant_method": "awq", "w_bit": 4}, "awq (4 bits)"),
    ],
)
def test_declared_beside_the_config(
    src: Path, file: str, content: dict[str, Any], named: str
) -> None:
    """So is one that only a file beside the config declares."""
    write_json(src / file, content)
    assert named in refused(src).message


def test_mlx(src: Path) -> None:
    """MLX writes its settings twice, and names itself nowhere."""
    settings = {"group_size": 64, "bits": 4}
    edit_config(src, quantization=settings, quantization_config=settings)
    error = refused(src)
    assert "quantized with MLX (4 bits, groups of 64)" in error.message
    assert "mlx_lm.convert --dequantize" in str(error)


def test_what_is_no_format_of_weights(src: Path) -> None:
    """A quantized cache, empty settings, and a format that is read hinder nothing."""
    cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    write_json(src / "hf_quant_config.json", cache)
    edit_config(src, quantization_config={})
    assert check_files(Checkpoint(src)) == []
    edit_config(src, quantization_config={"quant_method": "fp8"})
    assert check_files(Checkpoint(src)) == []
    edit_config(src, quantization_config="fp8")
    assert "quantization_config in config.json is 'fp8', not a table" in refused(src).message


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("up_proj.weight_scale_2", torch.tensor(0.5), "NVFP4 (modelopt)"),
        ("up_proj.weight_packed", torch.zeros(4, dtype=torch.int32), "compressed-tensors"),
        ("up_proj.qweight", torch.zeros(4, dtype=torch.int32), "GPTQ or AWQ"),
        ("up_proj.weight.absmax", torch.zeros(4), "bitsandbytes"),
        ("up_proj.weight", torch.zeros(4, dtype=torch.uint32), "MLX"),
        ("up_proj.W_q", torch.zeros(4, dtype=torch.uint8), "HQQ"),
    ],
)
def test_declared_by_tensors_alone(src: Path, name: str, tensor: torch.Tensor, named: str) -> None:
    """What nobody declares shows in the names and types of tensors."""
    write_weights(src, read_weights(src) | {f"model.layers.0.mlp.experts.0.{name}": tensor})
    error = refused(src)
    assert isinstance(error, UnsupportedModelError)
    assert f"quantized with {named}" in error.message
    assert WEIGHTS in error.message


def test_type_that_nothing_reads(src: Path) -> None:
    """A type of safetensors that nothing here makes weights of is no damage."""
    raw = (src / WEIGHTS).read_bytes()
    assert raw.count(b'"BF16"') > 4
    (src / WEIGHTS).write_bytes(raw.replace(b'"BF16"', b'"F4"  '))
    error = refused(src)
    assert isinstance(error, UnsupportedModelError)
    assert "as F4, which is not read" in error.message


def test_before_a_download() -> None:
    """A config alone is enough to refuse by, and nothing beside the working folder is looked at."""
    check_format(None, {})
    check_format(None, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UnsupportedModelError, match="quantized with hqq"):
        check_format(None, {"quantization_config": {"quant_method": "hqq"}})
