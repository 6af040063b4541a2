"""Gradients through packed weights: those of the dequantized weights, whoever asks and however."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from fast_models import PROMPT, load_family
from gpu_experts.reference import activate, gated
from hybrid import HybridConfig
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.formats.block import Block, ExpertWeights, unpack_expert
from hybrid.formats.matrix import pack
from hybrid.formats.registry import FORMATS
from hybrid.grafts import expert_modules, runner_of
from hybrid.packed import gradients
from hybrid.packed.dense import PackedMlp, QuantizedLinear
from random_experts import random_experts
from shared_demo import placed


def agrees(found: Callable[..., Tensor], wanted: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Prove that two functions and their derivatives are the same."""
    results = []
    for function in (found, wanted):
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        value = function(*leaves)
        value.square().sum().backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", sorted(FORMATS))
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_a_linear_layer(fmt: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time or all: value and derivative of an ordinary layer, bias included."""
    monkeypatch.setattr(gradients, "_WEIGHTS", at_once)
    rng = np.random.default_rng(0)
    bias = torch.nn.Parameter(torch.randn(41))
    layer = QuantizedLinear(41, 50, fmt, bias)
    packed = pack(rng.standard_normal((41, 50)).astype(np.float32), fmt)
    layer.packed.data = torch.from_numpy(packed)
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    agrees(layer, lambda x: functional.linear(x, layer.weight, bias), x)
    assert bias.grad is not None
    mine = bias.grad.clone() / 2  # of both ways
    functional.linear(x, layer.weight, bias).square().sum().backward()
    torch.testing.assert_close(bias.grad - 2 * mine, mine, rtol=1e-4, atol=1e-3)


def plain_expert(w: ExpertWeights, shape: Block, x: Tensor) -> Tensor:
    """One expert by its formula."""
    sides: list[Any] = [None if side is None else torch.from_numpy(side) for side in w]
    gate, up, down, gate_bias, up_bias, down_bias = sides
    raised = functional.linear(x, up, up_bias)
    if gate is None:
        return functional.linear(activate(shape, raised), down, down_bias)
    opened = functional.linear(x, gate, gate_bias).clamp(max=shape.limit)
    raised = raised.clamp(-shape.limit, shape.limit) + shape.up_offset
    return functional.linear(activate(shape, opened) * raised, down, down_bias)


@pytest.mark.parametrize("fmt", sorted(FORMATS))
@pytest.mark.parametrize(
    "more", [{}, {"bias": True, "limit": 2.0, "alpha": 1.702, "up_offset": 1.0}, {"gated": False}]
)
def test_experts(fmt: str, more: dict[str, Any]) -> None:
    """By hidden states and routing weights; ids of no expert contribute nothing."""
    shape = Block(hidden=40, intermediate=36, format=fmt, **more)
    blocks, weights = random_experts(shape, 3)
    ids = torch.tensor([[0, 2], [2, -1], [3, 0], [0, 2], [2, 0]])

    def mine(x: Tensor, factors: Tensor) -> Tensor:
        expert = partial(gradients.run_expert, shape=shape, gate=partial(gated, shape))
        return gradients.run_experts(x, ids, factors, blocks, shape, expert)

    def plain(x: Tensor, factors: Tensor) -> Tensor:
        each = torch.stack([plain_expert(w, shape, x) for w in weights], dim=1)
        inside = (ids >= 0) & (ids < 3)
        chosen = each[torch.arange(5)[:, None], ids.clamp(0, 2)]
        return (chosen * (factors * inside)[..., None]).sum(dim=1)

    seeded = torch.Generator().manual_seed(0)
    agrees(mine, plain, torch.randn(5, 40, generator=seeded), torch.rand(5, 2, generator=seeded))


def test_a_packed_mlp() -> None:
    """A gated MLP that was packed as one expert passes gradients on."""
    shape = Block(hidden=32, intermediate=36, format="q8_0")
    blocks, (weights,) = random_experts(shape, 1)
    mlp = PackedMlp(torch.from_numpy(blocks[0, : shape.block_bytes].copy()), shape)
    agrees(
        mlp,
        lambda x: plain_expert(weights, shape, x.view(-1, 32)).view(x.shape),
        torch.randn(1, 4, 32),
    )


def test_no_weights_are_kept() -> None:
    """What waits for the way back are activations alone."""
    shape = Block(hidden=256, intermediate=256, format="q4_0")
    blocks, _ = random_experts(shape, 2)
    kept: list[int] = []
    expert = partial(gradients.run_expert, shape=shape, gate=partial(gated, shape))
    x = torch.randn(3, 256, requires_grad=True)
    ids, factors = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gradients.run_experts(x, ids, factors, blocks, shape, expert)
    assert max(kept) <= 6 * 256


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose experts and dense matrices are q8_0."""
    return load_family("qwen3_moe", tmp_path_factory.mktemp("quantized"), "q8_0")


def learned(model: Any) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(quantized: Any, reentrant: bool) -> None:
    """Loss and gradients are those without it, although parts are computed without gradients."""
    model = quantized.train()
    wanted = learned(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        found = learned(model)
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    assert found.keys() == wanted.keys()
    assert any("mlp.gate" in name for name in found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_autocast(quantized: Any) -> None:
    """Packed weights are multiplied in float32 whatever surrounds them."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learned(quantized.eval())
    wanted = learned(quantized)
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=0.03, atol=0.0)
    assert found.keys() == wanted.keys()


def test_second_derivatives_are_refused(quantized: Any) -> None:
    """Not silently zero."""
    x = torch.randn(2, 64, requires_grad=True)
    layer = quantized.model.layers[0].self_attn.q_proj
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_shared_model_refuses_to_train() -> None:
    """Beside a device a forward pass is as before; its gradients raise, naming the remedy."""
    model = placed("demo", 4).model
    out = model(input_ids=PROMPT, labels=PROMPT)
    assert out.loss.isfinite()
    with pytest.raises(UsageError, match="shared with a device") as raised:
        out.loss.backward()
    assert "vram=0" in str(raised.value.hint)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_adapters_learn_as_in_a_plain_model(hybrid_cache: Path) -> None:
    """50 steps of LoRA on the demo: the losses of transformers with the dequantized weights."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32, **options)

    ours = load(quantization_config=HybridConfig("q4_0", cache_dir=hybrid_cache))
    plain = load(experts_implementation="eager")
    own = [m for name, m in plain.named_modules() if name.endswith("mlp.experts")]
    for module, runner in zip(own, map(runner_of, expert_modules(ours)), strict=True):
        for at, block in enumerate(runner.blocks):
            w = unpack_expert(runner.shape, block[: runner.shape.block_bytes])
            module.gate_up_proj.data[at] = torch.from_numpy(np.concatenate((w.gate, w.up)))
            module.down_proj.data[at] = torch.from_numpy(w.down)
    losses, ids = [], PROMPT[:, :3]
    for model in (ours, plain):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        adapted = peft.get_peft_model(model, settings).train()
        adapters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-3)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
