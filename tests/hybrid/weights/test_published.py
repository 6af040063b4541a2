"""Checkpoints that somebody quantized: their own numbers, in formats of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import naive_published as naive
from checkpoints import edit_config, read_weights, refused, write_json, write_weights
from hybrid import plan
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.formats.block import unpack_expert
from hybrid.packed.dense import QuantizedLinear
from hybrid.weights.checkpoint import check, convert
from hybrid.weights.store import ExpertStore
from tiny_families import families, tiny_config

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ORDER = np.random.default_rng(5).permutation(np.arange(256) // 64)

Packer = Callable[[np.ndarray], tuple[naive.Parts, np.ndarray]]


def compressed(fmt: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def int4(size: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": size}
    return compressed("pack-quantized", **(weights | more))


def by_gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True} | more


#: How it is packed, its settings, and the format that it is kept in.
CASES: dict[str, tuple[Packer, dict[str, Any], str]] = {
    "int4 of 32": (lambda w: naive.compressed(w, 32), int4(32), "q4_0"),
    "int4 of 32, zeros": (
        lambda w: naive.compressed(w, 32, symmetric=False),
        int4(32, symmetric=False),
        "int4_32",
    ),
    "int4 of 64": (lambda w: naive.compressed(w, 64), int4(64), "int4_64"),
    "int4 of 128, zeros": (
        lambda w: naive.compressed(w, 128, symmetric=False),
        int4(128, symmetric=False),
        "int4_128",
    ),
    "int4 of rows": (
        lambda w: naive.compressed(w, -1),
        int4(0, strategy="channel", group_size=None),
        "int4_256",
    ),
    "int8, packed": (
        lambda w: naive.compressed(w, 64, bits=8),
        int4(64, num_bits=8),
        "q8_0",
    ),
    "int8": (
        naive.compressed_bytes,
        compressed("int-quantized", num_bits=8, type="int", symmetric=True),
        "q8_0",
    ),
    "awq of 32": (
        lambda w: naive.awq(w, 32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        "int4_32",
    ),
    "awq of 128": (
        lambda w: naive.awq(w, 128),
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        "int4_128",
    ),
    "gptq of 32": (lambda w: naive.gptq(w, 32), by_gptq(group_size=32), "q4_0"),
    "gptq of 64, zeros": (
        lambda w: naive.gptq(w, 64, symmetric=False),
        by_gptq(sym=False, checkpoint_format="gptq"),
        "int4_64",
    ),
    "gptq_v2 of 128, zeros": (
        lambda w: naive.gptq(w, 128, symmetric=False, less=0),
        by_gptq(sym=False, group_size=128, checkpoint_format="gptq_v2"),
        "int4_128",
    ),
    "gptq of 8 bits": (lambda w: naive.gptq(w, 64, bits=8), by_gptq(bits=8), "q8_0"),
    "nvfp4 of modelopt": (
        lambda w: naive.nvfp4(w, modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        "nvfp4",
    ),
    "nvfp4": (
        lambda w: naive.nvfp4(w, modelopt=False),
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        "nvfp4",
    ),
    "mxfp4": (
        naive.mxfp4,
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        "mxfp4",
    ),
}


def model_of(directory: Path, kind: str = "qwen3_moe") -> None:
    """Save a random model of whole super-blocks."""
    torch.manual_seed(0)
    config_kind, model_kind = families()[kind]
    sizes = {"hidden_size": 256, "num_local_experts": 4, "num_experts": 4}
    size = "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"
    config = tiny_config(config_kind, **sizes, **{size: 256}, head_dim=64)
    model = model_kind._from_config(config, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)


def quantized(
    tmp_path: Path, packer: Packer, settings: dict[str, Any] | None, kind: str = "qwen3_moe"
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a model with its projections packed; return it and the weights that are meant."""
    src = tmp_path / "src"
    model_of(src, kind)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for key, weight in read_weights(src).items():
        stored[key] = meant[key] = weight
        if key.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            path = stored.pop(key) is None or key.removesuffix(".weight")
            parts, values = packer(weight.float().numpy())
            stored |= {f"{path}.{name}": part.contiguous() for name, part in parts.items()}
            meant[key] = torch.from_numpy(np.ascontiguousarray(values))
    write_weights(src, stored)
    if settings is not None:
        edit_config(src, quantization_config=settings)
    return src, meant


def experts_in(directory: Path, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    """Every matrix of the experts of a store, by the name that it has in a checkpoint."""
    store = ExpertStore.open(directory)
    found = {}
    for record in store.index.layers:
        for expert, block in enumerate(store.blocks(record)):
            shape = record.shape(store.index.format)
            weights = unpack_expert(shape, block[: shape.block_bytes])
            path = record.module.replace("mlp", "block_sparse_moe" if names[0] == "w1" else "mlp")
            for name, values in zip(names, weights, strict=False):
                found[f"{path}.{expert}.{name}.weight"] = values
    return found


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def meant_logits(src: Path, meant: dict[str, torch.Tensor], tmp_path: Path) -> torch.Tensor:
    """The logits of transformers' own model with these weights."""
    wide = tmp_path / "meant"
    wide.mkdir()
    config = json.loads((src / "config.json").read_text())
    config.pop("quantization_config", None)
    write_json(wide / "config.json", config)
    write_weights(wide, {key: weight.contiguous() for key, weight in meant.items()})
    return logits(wide)


@pytest.mark.parametrize("case", CASES)
def test_own_numbers(case: str, tmp_path: Path) -> None:
    """Experts and dense layers hold exactly what was published, in the format that is nearest."""
    packer, settings, fmt = CASES[case]
    src, meant = quantized(tmp_path, packer, settings)
    told: list[str] = []
    result = convert(src, tmp_path / "own", tell=told.append)
    assert result.format == fmt
    assert any(f"kept as published: experts in {fmt} (2 layers)" in line for line in told)
    assert not any("not exactly" in line for line in told)
    for key, values in experts_in(tmp_path / "own", PROJECTIONS).items():
        np.testing.assert_array_equal(values, meant[key].numpy(), err_msg=key)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        module = model.get_submodule(path)
        assert isinstance(module, QuantizedLinear)
        assert torch.equal(module.weight, meant[f"{path}.weight"])
    expected = meant_logits(src, meant, tmp_path)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        exact = model.train()(input_ids=IDS).logits  # torch's arithmetic: no int8 activations
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    assert (found - expected).abs().median() < 0.02 * expected.abs().max()
    if "input_scale" in {key.rpartition(".")[2] for key in read_weights(src)}:
        assert any("not used: " in line and "input_scale" in line for line in told)


@pytest.mark.parametrize("share", ["tensor", "row", "block"])
def test_floats_of_8_bits(share: str, tmp_path: Path) -> None:
    """fp8 of compressed-tensors and ModelOpt, whatever shares a scale: the same logits."""
    settings = compressed("float-quantized", num_bits=8, type="float")
    src, meant = quantized(tmp_path, lambda w: naive.fp8(w, share), settings)
    expected = meant_logits(src, meant, tmp_path)
    convert(src, tmp_path / "f32", experts="f32")
    torch.testing.assert_close(logits(tmp_path / "f32"), expected, rtol=1e-5, atol=1e-5)
    assert convert(src, tmp_path / "own").format == "q4_0"


@pytest.mark.parametrize("nested", [False, True])
def test_normal_floats(nested: bool, tmp_path: Path) -> None:
    """bitsandbytes' nf4: codes and scales as they are; its table is rounded, and that is said."""
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    settings |= {"bnb_4bit_quant_type": "nf4"}
    src, meant = quantized(tmp_path, lambda w: naive.nf4(w, nested=nested), settings)
    expected = meant_logits(src, meant, tmp_path)
    told: list[str] = []
    assert convert(src, tmp_path / "own", tell=told.append).format == "nf4"
    assert "in nf4 they differ by 0.49 %" in told[-1]
    for key, values in experts_in(tmp_path / "own", PROJECTIONS).items():
        largest = meant[key].abs().max()
        assert 0 < np.abs(values - meant[key].numpy()).max() < 0.004 * largest
    assert (logits(tmp_path / "own") - expected).abs().median() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("by", ["gptq", "compressed-tensors"])
def test_groups_in_an_order_of_their_own(by: str, tmp_path: Path) -> None:
    """Groups by importance fit no format of ours: requantized, and said with the error."""
    if by == "gptq":
        settings, order = by_gptq(desc_act=True), ORDER
        src, meant = quantized(tmp_path, lambda w: naive.gptq(w, 64, order=order), settings)
    else:
        settings, order = int4(64, actorder="group"), ORDER
        src, meant = quantized(tmp_path, lambda w: naive.compressed(w, 64, order=order), settings)
    told: list[str] = []
    assert convert(src, tmp_path / "own", tell=told.append).format == "q4_k"
    assert any("100 % of the quantized weights are not exactly" in line for line in told)
    with pytest.raises(CheckpointError, match="something else in q4_k, and --exact keeps"):
        convert(src, tmp_path / "exact", exact=True)
    convert(src, tmp_path / "f32", experts="f32")
    for key, values in experts_in(tmp_path / "f32", PROJECTIONS).items():
        np.testing.assert_array_equal(values, meant[key].numpy(), err_msg=key)
    assert plan(src, "cpu-only-laptop").request.experts == "q4_k"


def test_scales_that_are_rounded_are_said(tmp_path: Path) -> None:
    """A float32 scale has no half precision: the codes stay, and the difference is told."""
    packer = lambda w: naive.compressed(w, 32, dtype=torch.float32)  # noqa: E731
    src, meant = quantized(tmp_path, packer, int4(32))
    told: list[str] = []
    assert convert(src, tmp_path / "own", tell=told.append).format == "q4_0"
    assert any("100 % of the quantized weights" in line and "0.0" in line for line in told)
    for key, values in experts_in(tmp_path / "own", PROJECTIONS).items():
        np.testing.assert_allclose(values, meant[key].numpy(), rtol=2**-11)


@pytest.mark.parametrize("size", [1 << 30, 1 << 12])
def test_pieces_and_other_names(size: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Small pieces and Mixtral's names: the same numbers, of layouts with rows side by side."""
    monkeypatch.setattr("hybrid.weights.weight_map.PIECE_BYTES", size)
    monkeypatch.setattr("hybrid.weights.expert_writer._VALUES", size)
    monkeypatch.setattr("hybrid.weights.dense_writer._CHUNK_BYTES", size)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64}
    src, meant = quantized(tmp_path, lambda w: naive.awq(w, 64), settings, "mixtral")
    convert(src, tmp_path / "own")
    found = experts_in(tmp_path / "own", ("w1", "w3", "w2"))
    assert len(found) == 2 * 4 * 3
    for key, values in found.items():
        np.testing.assert_array_equal(values, meant[key].numpy(), err_msg=key)


def test_some_layers_as_they_were(tmp_path: Path) -> None:
    """A layer that its publisher left alone keeps its numbers, a mixed one takes the larger."""
    src, meant = quantized(tmp_path, lambda w: naive.compressed(w, 64), int4(64))
    stored = read_weights(src)
    for key in [key for key in stored if ".layers.1." in key and ".weight_packed" in key]:
        path = key.removesuffix(".weight_packed")
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del stored[f"{path}.{part}"]
        stored[f"{path}.weight"] = meant[f"{path}.weight"].clone()
    write_weights(src, stored)
    convert(src, tmp_path / "own")
    index = ExpertStore.open(tmp_path / "own").index
    assert [layer.shape(index.format).format for layer in index.layers] == ["int4_64", "f32"]
    for key, values in experts_in(tmp_path / "own", PROJECTIONS).items():
        np.testing.assert_array_equal(values, meant[key].numpy(), err_msg=key)


@pytest.mark.parametrize("case", ["int4 of 32", "awq of 128", "gptq of 64, zeros", "nvfp4"])
def test_plans_take_what_conversions_make(case: str, tmp_path: Path) -> None:
    """The format that settings foretell is the one that tensors have, sizes included."""
    packer, settings, fmt = CASES[case]
    src, _ = quantized(tmp_path, packer, settings)
    found = plan(src, "cpu-only-laptop", context=64, prompt=8)
    assert found.request.experts == fmt
    size = next(item.bytes for item in found.fit.items if item.name.startswith("experts in RAM"))
    assert size == check(src).expert_bytes == convert(src, tmp_path / "own").expert_bytes


def test_declared_beside_the_config_only(tmp_path: Path) -> None:
    """ModelOpt's own file is enough, for conversions and for plans."""
    src, meant = quantized(tmp_path, lambda w: naive.nvfp4(w, modelopt=True), None)
    inner = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    write_json(src / "hf_quant_config.json", {"quantization": inner})
    assert plan(src, "cpu-only-laptop").request.experts == "nvfp4"
    assert convert(src, tmp_path / "own").format == "nvfp4"
    for key, values in experts_in(tmp_path / "own", PROJECTIONS).items():
        np.testing.assert_array_equal(values, meant[key].numpy(), err_msg=key)


def test_a_format_that_is_asked_for(tmp_path: Path) -> None:
    """What is asked for comes of the published numbers, exactly where it can; nothing is told."""
    packer, settings, _ = CASES["awq of 32"]
    src, meant = quantized(tmp_path, packer, settings)
    for fmt, most in (("q8_0", 0), ("q5_k", 0.05)):
        told: list[str] = []
        result = convert(src, tmp_path / fmt, experts=fmt, dense="q8_0", tell=told.append)
        assert result.format == fmt
        assert not any("not exactly" in line or "kept as" in line for line in told)
        for key, values in experts_in(tmp_path / fmt, PROJECTIONS).items():
            error = np.abs(values - meant[key].numpy()).max()
            assert (error > 0) == (most > 0)
            assert error <= most * meant[key].abs().max()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv cannot be read"),
        ({"quant_method": "gptq", "bits": 3}, "gptq (3 bits)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin cannot be"),
        (compressed("marlin-24", num_bits=4), "compressed-tensors (marlin-24, 4 bits)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "modelopt (NVFP4_AWQ)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"quant_method": "hqq", "bits": 4}, "hqq (4 bits)"),
    ],
)
def test_kinds_that_are_not_read(settings: dict[str, Any], named: str, src: Path) -> None:
    """Refused by name, with what of it is not read."""
    edit_config(src, quantization_config=settings)
    error = refused(src)
    assert isinstance(error, UnsupportedModelError)
    assert named in error.message


def test_settings_of_other_weights(src: Path) -> None:
    """Settings that say quantized and weights that are not are of two models."""
    edit_config(src, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    error = refused(src)
    assert isinstance(error, CheckpointError)
    assert "quantized with awq (4 bits, groups of 128), says config.json" in error.message
    assert "hold no such tensors" in error.message


@pytest.mark.parametrize(
    ("case", "part", "value"),
    [
        ("awq of 32", "scales", float("inf")),
        ("int4 of 32", "weight_scale", float("nan")),
        ("nvfp4 of modelopt", "weight_scale", float("nan")),
        ("nvfp4 of modelopt", "weight_scale_2", float("inf")),
        ("mxfp4", "weight_scale", 255),
    ],
)
def test_scales_that_are_no_numbers(case: str, part: str, value: float, tmp_path: Path) -> None:
    """A damaged scale is refused, and its expert and matrix are named."""
    packer, settings, _ = CASES[case]
    src, _ = quantized(tmp_path, packer, settings)
    stored = read_weights(src)
    stored[f"model.layers.1.mlp.experts.2.down_proj.{part}"].view(-1)[:1] = value
    write_weights(src, stored)
    named = r"1 matrices of experts hold inf or NaN: model.layers.1.mlp.experts, expert 2, down"
    with pytest.raises(CheckpointError, match=named):
        convert(src, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("case", "part", "made"),
    [
        ("int4 of 32", "weight_shape", torch.tensor([3])),
        ("int4 of 32", "weight_shape", torch.tensor([256, 0])),
        ("int4 of 64", "weight_scale", torch.zeros(256, 3)),
        ("gptq of 32", "qweight", torch.zeros(5, dtype=torch.int32)),
        ("gptq of 64, zeros", "g_idx", torch.full((256,), 9, dtype=torch.int32)),
        ("nvfp4", "weight_scale", torch.zeros(256, 3).to(torch.float8_e4m3fn)),
    ],
)
def test_parts_that_make_no_matrix(
    case: str, part: str, made: torch.Tensor, tmp_path: Path
) -> None:
    """Whatever a part is, the matrix is named, and nothing is written."""
    packer, settings, _ = CASES[case]
    src, _ = quantized(tmp_path, packer, settings)
    key = f"model.layers.0.self_attn.q_proj.{part}"
    write_weights(src, read_weights(src) | {key: made})
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.q_proj"):
        convert(src, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    """Parts of a matrix that do not belong together are named with their sizes."""
    packer, settings, _ = CASES["awq of 32"]
    src, _ = quantized(tmp_path, packer, settings)
    stored = read_weights(src)
    key = "model.layers.0.self_attn.q_proj.qzeros"
    stored[key] = stored[key][:, :-1].contiguous()
    write_weights(src, stored)
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj: no codes .*qzeros \["):
        convert(src, tmp_path / "own")
