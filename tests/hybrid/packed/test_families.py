"""Every text family of transformers that has experts runs from the store like it does without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybrid import HybridConfig
from hybrid.anatomy.experts import ExpertsSpec, find_experts
from hybrid.ask.asked_model import find_model
from hybrid.errors import UnsupportedModelError
from hybrid.formats.activations import round_activations
from hybrid.formats.block import pack_expert, unpack_expert
from hybrid.packed.dense import QuantizedEmbedding, QuantizedLinear
from hybrid.planning.files import files_of
from hybrid.weights.checkpoint import convert
from hybrid.weights.store import ExpertStore
from massive import make_massive
from tiny_families import VOCAB, families, multimodal, tiny_config

#: jetmoe routes its attention through experts too; no other family is left out.
UNSUPPORTED = {"jetmoe"}
#: Families whose gating the kernels have no parameters for.
OWN_GATING = {"inkling2_loop_text", "inkling2_text"}
#: Families whose attention is told from that of the kernels by the decoder's test alone.
OTHER_ATTENTION = {"exaone_moe", "flint", "lara_mini"}
FAMILIES = families()
#: Families of several modalities that have no class for text alone, or are often used so.
MULTIMODAL = multimodal("step3p7", "llama4", "qwen3_vl_moe", "qwen3_5_moe", "minimax_m3_vl")
ALL = FAMILIES | MULTIMODAL


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Tiny matrices are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, **changes: Any) -> Any:
    """Return a random eager model whose experts matter: their weights are not small."""
    config_kind, model_kind = ALL[kind]
    torch.manual_seed(sum(map(ord, kind)))
    config = tiny_config(config_kind, **changes)
    model = model_kind._from_config(config, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name and parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


def generate(model: Any, ids: Tensor) -> list[int]:
    """Greedy, and to the end: an end token in the config would only shorten the test."""
    out = model.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(i) for i in out[0]]


class Reference:
    """Stands in for ``LayerExperts``: plain float32 on the store's dequantized weights.

    Activations are rounded where the kernels round them; gating is the family's own code.
    """

    def __init__(self, spec: ExpertsSpec, store: ExpertStore, layer: int) -> None:
        record = store.index.layers[layer]
        self.spec, self.shape = spec, record.shape(store.index.format)
        self.rounds = self.shape.format in ("q4_0", "q8_0")
        size = self.shape.block_bytes
        self.weights = [unpack_expert(self.shape, b[:size]) for b in store.blocks(record)]

    def project(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        rows = round_activations(x.numpy()) if self.rounds else x.numpy()
        return torch.from_numpy(rows @ weight.T + (0 if bias is None else bias))

    def __call__(self, hidden: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        x = hidden.detach().reshape(-1, self.shape.hidden).float()
        out = torch.zeros_like(x)
        norm = getattr(self.spec.module, "post_expert_norm", None)
        for e, w in enumerate(self.weights):
            tokens, choices = torch.where(ids == e)
            if not len(tokens):
                continue
            gate = None if w.gate is None else self.project(x[tokens], w.gate, w.gate_bias)
            up = self.project(x[tokens], w.up, w.up_bias)
            down = self.project(self.spec.apply_gate(gate, up), w.down, w.down_bias)
            down = down if norm is None else norm(down)
            out.index_add_(0, tokens, down * routing_weights[tokens, choices, None])
        return out.view(hidden.shape).to(hidden.dtype)


def test_every_family_is_listed() -> None:
    """The families are found by introspection: this is how many the adapters were made for."""
    assert len(FAMILIES) >= 50
    assert FAMILIES.keys() >= UNSUPPORTED


@pytest.mark.parametrize("kind", sorted(ALL.keys() - UNSUPPORTED))
def test_family_runs_from_the_store(kind: str, tmp_path: Path) -> None:
    """f32 store: eager's logits to 1e-5, its greedy text, its gradients; q4_0: a reference's.

    Both stores hold, byte for byte, what ``pack_expert`` makes of the model's weights, and no
    expert parameter stays in memory. Quantized dense matrices run like a reference too.
    """
    eager = build(kind)
    ids = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
    expected, text = logits(eager, ids), generate(eager, ids)
    assert expected.isfinite().all()
    moved = {f"{spec.path}.{name}" for spec in find_experts(eager) for name in spec.parameters}
    assert moved <= dict(eager.named_parameters()).keys()
    eager.save_pretrained(tmp_path / "src")
    loaded = type(eager)

    convert(tmp_path / "src", tmp_path / "f32", experts="f32")
    assert_planned(tmp_path, "f32", "f32", None)
    exact = loaded.from_pretrained(tmp_path / "f32", dtype=torch.float32)
    torch.testing.assert_close(logits(exact, ids), expected, rtol=1e-5, atol=1e-5)
    assert generate(exact, ids) == text
    assert_same_gradients(exact, eager, ids)
    assert not moved & dict(exact.named_parameters()).keys()
    assert not moved & exact.state_dict().keys()
    own = {m.hybrid_experts.own_gating for m in exact.modules() if hasattr(m, "hybrid_experts")}
    assert own == {kind in OWN_GATING}

    convert(tmp_path / "src", tmp_path / "q4", experts="q4_0")
    assert_planned(tmp_path, "q4", "q4_0", None)
    quantized = loaded.from_pretrained(tmp_path / "q4", dtype=torch.float32)
    assert_same_weights(exact.hybrid_store, quantized.hybrid_store)
    assert_runs_like(replace_experts, quantized, ids, expected)

    convert(tmp_path / "src", tmp_path / "dense", experts="f32", dense="q8_0")
    assert_planned(tmp_path, "dense", "f32", "q8_0")
    # Not on the fast path, which packs more than is replaced below.
    plain = HybridConfig(fast=False)
    dense = loaded.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=plain
    )
    assert len(generate(dense, ids)) == len(text)
    for path, module in dense.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            weight = eager.get_submodule(path).weight
            assert (module.weight - weight).abs().max() <= 0.005 * weight.abs().max()
    assert_runs_like(replace_linears, dense, ids, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(ALL.keys() - UNSUPPORTED))
def test_family_with_massive_activations(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Values in the thousands in its stream: as exact as the family's own code in either type.

    Exact is that code in float32. No family loses the fast path to what it does to its numbers.
    """
    eager = build(kind).bfloat16().float()
    make_massive(eager)
    eager.bfloat16().float().save_pretrained(tmp_path / "src")
    ids = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
    expected = logits(eager, ids)
    assert expected.isfinite().all()
    convert(tmp_path / "src", tmp_path / "f32", experts="f32")
    loaded = type(eager).from_pretrained(tmp_path / "f32", dtype=dtype)
    apart = (logits(loaded, ids).float() - expected).norm()
    options = {"dtype": dtype, "experts_implementation": "eager"}
    own = type(eager).from_pretrained(tmp_path / "src", **options)
    theirs = (logits(own, ids).float() - expected).norm()
    assert apart <= 1.5 * theirs + 1e-4 * expected.norm()
    generate(loaded, ids)
    reason = loaded.hybrid_fast.path.reason
    assert ("differs" in reason) == (kind in OTHER_ATTENTION), reason
    assert "another norm" not in reason
    assert "another way" not in reason


def assert_planned(folder: Path, name: str, experts: str, dense: str | None) -> None:
    """Prove that plans of a checkpoint and of its converted copy know their size to the byte."""
    written = folder / name
    taken = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    source, copy = find_model(folder / "src", experts, dense), find_model(written)
    for asked in (source, copy):
        found = files_of(asked, dense)
        assert found.errors == []
        assert found.dense_bytes == taken
        assert asked.spec.store_bytes(experts) == (written / "experts.bin").stat().st_size
        assert asked.spec.unread == ()


def assert_same_gradients(model: Any, eager: Any, ids: Tensor) -> None:
    """Prove that every dense parameter learns what it learns in a model with all its weights."""
    for each in (model, eager):
        each(input_ids=ids, labels=ids).loss.backward()
    wanted = dict(eager.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5 * largest, msg=name
            )


def assert_runs_like(
    replace: Callable[[Any], None], model: Any, ids: Tensor, unquantized: Tensor
) -> None:
    """Prove that a model's logits do not change when plain arithmetic replaces the kernels."""
    got = logits(model, ids)
    replace(model)
    reference = logits(model, ids)
    # A sum that lands on the other side of a rounding boundary moves one activation by one
    # step, which may tip the choice of an expert for one token of the eleven. Nothing else
    # may differ, while quantization itself shows everywhere.
    apart = (got - reference).abs().flatten()
    assert apart.median() < 1e-4 * reference.std()
    assert apart.quantile(0.85) < 0.02 * reference.std()
    assert (unquantized - reference).abs().median() > 1e-3 * reference.std()


def replace_experts(model: Any) -> None:
    attached = [module for module in model.modules() if hasattr(module, "hybrid_experts")]
    for layer, module in enumerate(attached):
        module.hybrid_experts = Reference(module.hybrid_experts.spec, model.hybrid_store, layer)


def replace_linears(model: Any) -> None:
    for module in [m for m in model.modules() if isinstance(m, QuantizedLinear)]:

        def forward(x: Tensor, weight: Tensor = module.weight, bias: Any = module.bias) -> Tensor:
            rows = round_activations(x.reshape(-1, x.shape[-1]).numpy())
            return nn.functional.linear(torch.from_numpy(rows).view(x.shape), weight, bias)

        module.forward = forward  # type: ignore[method-assign]


def assert_same_weights(exact: ExpertStore, quantized: ExpertStore) -> None:
    """Prove that quantizing piece by piece gives the bytes of quantizing at once."""
    for record, other in zip(exact.index.layers, quantized.index.layers, strict=True):
        full, small = record.shape("f32"), other.shape(quantized.index.format)
        for block, found in zip(exact.blocks(record), quantized.blocks(other), strict=True):
            weights = unpack_expert(full, block[: full.block_bytes])
            packed = pack_expert(small, **weights._asdict())
            np.testing.assert_array_equal(found[: small.block_bytes], packed)


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED))
def test_unsupported_family_is_refused(kind: str, tmp_path: Path) -> None:
    """What cannot run raises at once, naming the module, and nothing is written."""
    build(kind).save_pretrained(tmp_path / "src")
    with pytest.raises(UnsupportedModelError, match="it declares its experts in a way of its own"):
        convert(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(UnsupportedModelError, match="declares its experts in a way of its own"):
        ALL[kind][1].from_pretrained(tmp_path / "src", quantization_config=HybridConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
