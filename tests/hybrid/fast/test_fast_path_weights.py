"""A model with the fast path is still transformers' model: edits, adapters, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fast_models import (
    PROMPT,
    converted,
    open_model,
    opened,
    owned,
    packed_modules,
    save_family,
    write,
)
from hybrid.errors import UsageError
from hybrid.weights.checkpoint import convert

pytestmark = pytest.mark.usefixtures("half_precision_caches")


@torch.no_grad()
def negate(weight: torch.Tensor) -> None:
    weight.mul_(-1.5)


class Lora(nn.Module):
    """What adapters put around a linear layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(base.in_features, 2, generator=generator))
        self.b = nn.Parameter(torch.randn(2, base.out_features, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a @ self.b  # type: ignore[no-any-return]


def _other_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.roll(1, 0) for name, value in model.state_dict().items()}


def _adapt(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = Lora(attention.q_proj)


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


def _new_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, 96, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(3, 0))


def _new_parameter(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(-gate.weight.detach())


def _other_data(model: Any) -> None:
    weight = model.model.norm.weight
    weight.data = weight.data * torch.linspace(-1, 1, 64)


def _resize(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(100)
    with torch.no_grad():
        model.lm_head.weight[99] = model.lm_head.weight[:96].sum(0)


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: negate(model.model.layers[0].self_attn.q_proj.weight),
    "in inference mode": torch.inference_mode()(lambda model: model.model.norm.weight.mul_(-2)),
    "another head": _new_head,
    "another parameter": _new_parameter,
    "other data": _other_data,
    "load_state_dict": lambda model: model.load_state_dict(_other_state(model)),
    "assigned": lambda model: model.load_state_dict(_other_state(model), assign=True),
    "resized": _resize,
    "an optimizer": _step,
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_after_a_text_are_in_the_next(pair: Any, name: str) -> None:
    """The path notices, reads the weights again and writes what transformers writes."""
    model, plain = pair
    before = write(model)
    decoder = model.hybrid_fast.decoder
    for each in pair:
        EDITS[name](each)
    found = write(model)
    assert torch.equal(found, write(plain))
    assert not torch.equal(found, before)
    assert model.hybrid_fast.path.fast
    assert model.hybrid_fast.decoder is not decoder


def test_an_adapter_comes_and_goes(pair: Any) -> None:
    """With it transformers computes, and its gradients are right; without it the path is back."""
    model, plain = pair
    wanted = write(model)
    for each in pair:
        _adapt(each)
        assert isinstance(each.model.layers[0].self_attn.q_proj.base_layer, nn.Linear)
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.path.reason == "q_proj is a Lora"
    for each in pair:
        each(input_ids=PROMPT, labels=PROMPT).loss.backward()
    for (_, found), (_, expected) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad)
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer
    assert torch.equal(write(model), wanted)
    assert model.hybrid_fast.path.fast


def test_modules_and_parameters_stay(pair: Any) -> None:
    """A text changes nothing that can be seen from outside: objects, memory, state, types."""
    model, plain = pair
    parameters = dict(model.named_parameters())
    places = [parameter.data_ptr() for parameter in parameters.values()]
    modules = list(model.modules())
    write(model)
    assert model.hybrid_fast.path.fast
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert [parameter.data_ptr() for parameter in after.values()] == places
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert all(p.requires_grad for p in model.requires_grad_(True).parameters())


def test_training_between_texts(pair: Any) -> None:
    """Gradients, a text, and only then the step: the weights of transformers alone."""
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=PROMPT, labels=PROMPT).loss.backward()
            write(model)
            optimizer.step()
    for found, wanted in zip(*(model.parameters() for model in pair), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(write(pair[0]), write(pair[1]))


def test_gradients_of_the_body_alone(pair: Any, qwen_folder: Path) -> None:
    """Every parameter has its gradient; replaced modules refuse where they would have lost it."""
    write(pair[0])
    for each in pair:
        each.model(input_ids=PROMPT).last_hidden_state.sum().backward()
    for found, wanted in zip(*(each.parameters() for each in pair), strict=True):
        assert (found.grad is None) == (wanted.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)
    model = owned(qwen_folder)
    write(model)
    with pytest.raises(UsageError, match="gradients cannot pass") as raised:
        model.model(input_ids=PROMPT)
    assert "hybrid_fast.release(model)" in str(raised.value.hint)


def test_gradients_bring_replaced_modules_back(qwen_folder: Path) -> None:
    """The same parameters with the same values, their gradients are transformers' own."""
    model, plain = owned(qwen_folder), open_model(qwen_folder, fast=False)
    before = dict(model.named_parameters())
    write(model)
    assert "lm_head.weight" not in dict(model.named_parameters())
    for each in (model, plain):
        each(input_ids=PROMPT, labels=PROMPT).loss.backward()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, parameter in plain.named_parameters():
        assert after[name] is before[name]
        assert torch.equal(after[name], parameter), name
        torch.testing.assert_close(after[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(write(model), write(plain))
    assert packed_modules(model)


@pytest.mark.parametrize("replace", [False, True])
def test_inference_mode_leaves_no_trace(qwen_folder: Path, replace: bool) -> None:
    """A text and a release in it: the weights can still be trained and written."""
    model, plain = (
        opened(qwen_folder, replace),
        open_model(qwen_folder, fast=False),
    )
    with torch.inference_mode():
        assert torch.equal(write(model), write(plain))
        model.hybrid_fast.release(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    _step(model)
    _step(plain)
    assert torch.equal(write(model), write(plain))


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    """Embedding and lm_head share one parameter again, and the model knows it."""
    save_family("qwen3_moe", tmp_path / "source", tie_word_embeddings=True)
    convert(tmp_path / "source", tmp_path / "model", experts="f32")
    model = owned(tmp_path / "model")
    tied, weight = dict(model.all_tied_weights_keys), model.lm_head.weight
    wanted = weight.clone()
    write(model)
    assert model.lm_head.weight is not weight
    model.hybrid_fast.release(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert torch.equal(weight, wanted)
    assert model.all_tied_weights_keys == tied


def test_a_shared_expert_comes_back(tmp_path: Path) -> None:
    """An MLP whose matrices were laid out in one block has them again."""
    model = owned(converted("qwen2_moe", tmp_path))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    write(model)
    assert any("shared_expert" in name for name in packed_modules(model))
    model.hybrid_fast.release(model)
    found = model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
