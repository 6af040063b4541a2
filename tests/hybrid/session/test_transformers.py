"""transformers reaches the store by itself: registration, pipelines, casts and moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.activations import ACT2FN

from checkpoints import edit_config, in_fp8_blocks, read_weights, write_weights
from cpu_experts.ffn import run_experts
from hybrid import HybridConfig
from hybrid.anatomy.experts import ExpertsSpec, find_experts, recognise_gating
from hybrid.errors import UnsupportedModelError
from hybrid.formats.block import ACTIVATIONS, Block, pack_expert, unpack_expert
from hybrid.weights.checkpoint import convert
from tiny_families import families, tiny_config

IDS = torch.arange(40, 52)[None]


@pytest.fixture(scope="module")
def converted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(tiny_model, folder, experts="f32")
    return folder


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, **options).logits
    return out


IMPORT = """
import sys, hybrid
assert not {"torch", "numba", "transformers", "numpy"} & sys.modules.keys()
"""
PIPELINE = """
from transformers import pipeline
write = pipeline("text-generation", sys.argv[1])
print(write("def ", max_new_tokens=4, do_sample=False, return_full_text=False)[0])
print(type(write.model.model.layers[0].mlp.experts.hybrid_experts).__name__)
"""
LATE = """
import transformers.quantizers.auto, sys, hybrid
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.experts.hybrid_experts).__name__)
"""


@pytest.mark.parametrize("code", [IMPORT + PIPELINE, LATE])
def test_import_is_enough(code: str, converted: Path) -> None:
    """``import hybrid``, before or after transformers, makes its directories load.

    The import itself loads none of the heavy packages.
    """
    command = [sys.executable, "-c", code, str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LayerExperts"


def test_a_checkpoint_is_converted_into_the_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """from_pretrained with a HybridConfig converts once per checkpoint and formats."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def load(**options: Any) -> Any:
        config = HybridConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            tiny_model, quantization_config=config, dtype=torch.float32
        )

    def copies() -> set[str]:
        return {path.name for path in (tmp_path / "converted").iterdir() if path.is_dir()}

    model = load(experts="f32")
    torch.testing.assert_close(logits(model), logits(eager), rtol=1e-5, atol=1e-5)
    assert model.config.quantization_config.store
    (first,) = copies()
    monkeypatch.setattr(
        "hybrid.weights.cache.convert", lambda *a, **k: pytest.fail("converted twice")
    )
    load(experts="f32")
    monkeypatch.undo()
    assert first.startswith("tiny-")
    load(experts="f32", cache_dir=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("tiny-*/experts.bin"))) == 1
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    assert load().hybrid_store.index.format == "q4_0"
    weights = read_weights(tiny_model)
    assert len(copies()) == 2
    assert first in copies()
    changed = tmp_path / "tiny"
    convert_changed = {key: weight * 1.5 for key, weight in weights.items()}
    changed.mkdir()
    for path in tiny_model.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    write_weights(changed, convert_changed)
    AutoModelForCausalLM.from_pretrained(changed, quantization_config=HybridConfig("f32"))
    assert len(copies()) == 3


def test_a_quantized_checkpoint_is_converted_too(tmp_path: Path) -> None:
    """An fp8 checkpoint with a HybridConfig: transformers alone refuses the combination."""
    kind, model_kind = families()["qwen3_moe"]
    model_kind(tiny_config(kind)).save_pretrained(tmp_path / "src")
    stored, _ = in_fp8_blocks(read_weights(tmp_path / "src"), 32)
    write_weights(tmp_path / "src", stored)
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    edit_config(tmp_path / "src", quantization_config=fp8)
    config = HybridConfig("f32", cache_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "src", quantization_config=config)
    assert logits(model).isfinite().all()
    assert model.config.quantization_config.quant_method == "hybrid"


def test_misspelt_option() -> None:
    """An option that does not exist is not swallowed."""
    with pytest.raises(TypeError, match="expert"):
        HybridConfig(expert="q4_0")  # type: ignore[call-arg]


def test_bfloat16_model(converted: Path) -> None:
    """A bfloat16 model: sums in float32, hidden states in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    ids, weights = torch.tensor([[0, 3]] * 5), torch.rand(5, 2, dtype=torch.bfloat16)
    found = experts(hidden, ids, weights)
    assert found.dtype == torch.bfloat16
    exact = experts(hidden.float(), ids, weights.float())
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_moving_and_casting_leave_the_experts(converted: Path) -> None:
    """``to`` changes dense weights only: the experts stay mapped and are still right."""
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    before = logits(model)
    blocks = model.model.layers[0].mlp.experts.hybrid_experts.blocks
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.model.layers[0].mlp.experts.hybrid_experts.blocks is blocks
    torch.testing.assert_close(logits(model).float(), before, rtol=1e-4, atol=1e-4)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.model.layers[0].mlp.experts.hybrid_experts.blocks is blocks


def test_no_experts_in_memory(converted: Path) -> None:
    """No parameter, buffer or state holds an expert, and saving is refused, not wrong."""
    model = AutoModelForCausalLM.from_pretrained(converted)
    names = [*dict(model.named_parameters()), *dict(model.named_buffers()), *model.state_dict()]
    assert not any("experts" in name for name in names)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(converted.parent / "saved")


def test_model_without_head(converted: Path) -> None:
    """AutoModel finds the experts although its modules' paths lack the prefix."""
    head = AutoModelForCausalLM.from_pretrained(converted)
    base = AutoModel.from_pretrained(converted)
    with torch.no_grad():
        expected = head.model(input_ids=IDS).last_hidden_state
        assert torch.equal(base(input_ids=IDS).last_hidden_state, expected)


def test_text_model_out_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """A converted multimodal directory also loads as its text model."""
    from tiny_families import multimodal

    kind, model_kind = multimodal("qwen3_5_moe")["qwen3_5_moe"]
    model_kind(tiny_config(kind)).eval().save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", experts="f32")
    whole = model_kind.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    assert type(text) is not type(whole)
    torch.testing.assert_close(logits(text), logits(whole), rtol=1e-5, atol=1e-5)


def test_batches_and_cached_generation(converted: Path, tiny_model: Path) -> None:
    """Padded batches and step-by-step decoding agree with eager."""
    eager = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))


def test_remote_kind_of_experts_is_refused() -> None:
    """Experts in a list of modules, as models with code of their own have them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    with pytest.raises(UnsupportedModelError, match="ModuleList at experts cannot run"):
        find_experts(Block())


def _spec(gate: Any, gated: bool = True, **numbers: float) -> ExpertsSpec:
    module = nn.Module()
    module.act_fn = gate
    if gated:
        module._apply_gate = lambda rows: gate(*rows.chunk(2, dim=-1))
    for name, value in numbers.items():
        setattr(module, name, value)
    return ExpertsSpec(
        path="experts", module=module, experts=3, hidden=8, intermediate=5, gated=gated,
        bias=False, up=("gate_up_proj",), down="down_proj",
    )  # fmt: skip


SHAPE = Block(hidden=8, intermediate=5, format="f32")


def _oss(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@pytest.mark.parametrize(
    ("gate", "numbers", "expected"),
    [
        (lambda g, u: nn.functional.silu(g) * u, {"hidden_dim": 8.0}, ("silu", None, 1.0, 0.0)),
        (lambda g, u: ACT2FN["gelu"](g) * u, {}, ("gelu", None, 1.0, 0.0)),
        (lambda g, u: ACT2FN["gelu_new"](g) * u, {}, ("gelu_tanh", None, 1.0, 0.0)),
        (lambda g, u: ACT2FN["quick_gelu"](g) * u, {}, ("silu", None, 1.702, 0.0)),
        (_oss, {"limit": 7.0, "alpha": 1.702}, ("silu", 7.0, 1.702, 1.0)),
        (lambda g, u: torch.relu(g) ** 2 * u, {}, ("relu2", None, 1.0, 0.0)),
    ],
)
def test_gating_is_recognised(gate: Any, numbers: dict[str, float], expected: Any) -> None:
    """A family's gating code is matched by running it, and the kernels agree with it."""
    torch.manual_seed(0)
    spec = _spec(gate, **numbers)
    shape = recognise_gating(spec, SHAPE)
    assert shape is not None
    assert shape.activation in ACTIVATIONS
    name, limit, alpha, up_offset = expected
    assert (shape.activation, shape.alpha, shape.up_offset) == (name, alpha, up_offset)
    assert shape.limit == (float("inf") if limit is None else limit)
    weights = {n: torch.randn(5, 8).numpy() * 4 for n in ("gate", "up")}
    block = pack_expert(shape, **weights, down=torch.randn(8, 5).numpy())
    w = unpack_expert(shape, block)
    x, out = torch.randn(6, 8), torch.zeros(6, 8)
    ids, ones = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    run_experts(x.numpy(), ids.numpy(), ones.numpy(), block[None], shape, out.numpy())
    sides = [x @ torch.from_numpy(side).T for side in (w.gate, w.up) if side is not None]
    expected_out = gate(*sides) @ torch.from_numpy(w.down).T
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "gate",
    [
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: nn.functional.silu(g).clamp(max=7.0) * u.clamp(-7.0, 7.0),
        lambda g, u: nn.functional.silu(g) * u * 1.001,
        lambda g, u: nn.functional.silu(g) * u.clamp(-150.0, 150.0),
    ],
)
def test_other_gating_is_left_to_the_family(gate: Any) -> None:
    """What only nearly fits, or fits where values are small, is not taken for a match."""
    assert recognise_gating(_spec(gate, limit=7.0), SHAPE) is None


def test_own_gating_runs(tmp_path: Path) -> None:
    """step3p7 clamps after the activation: its own code runs between the projections."""
    config = Qwen3MoeConfig(hidden_act="tanh", **_SMALL)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "src")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", quantization_config=HybridConfig("f32", cache_dir=tmp_path)
    )
    assert loaded.model.layers[0].mlp.experts.hybrid_experts.own_gating
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
