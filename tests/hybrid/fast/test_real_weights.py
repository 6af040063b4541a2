"""Trained weights run as random ones do: on the fast path, in both types, to the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid import HybridConfig
from hybrid.session.model import HybridModel
from hybrid.transformers_api import cache_argument, returned_cache
from hybrid.weights.checkpoint import convert
from real_model import save_real_model, unpacked

QUESTION = [{"role": "user", "content": "What is the capital of Italy, and what can I see there?"}]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
FORMATS = ("f32", "q8_0", "q4_0")


class Real(NamedTuple):
    """The converted models by format, and what the dense model answers."""

    folder: Path
    ids: torch.Tensor
    answer: str

    def load(self, experts: str, dtype: torch.dtype, **options: Any) -> Any:
        config = HybridConfig(**options)
        return AutoModelForCausalLM.from_pretrained(
            self.folder / experts, dtype=dtype, quantization_config=config
        )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    dense = save_real_model(unpacked(folder), folder / "model")
    for experts in FORMATS:
        convert(folder / "model", folder / experts, experts=experts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = dense.generate(**prompt, **GREEDY, pad_token_id=0)[0, prompt.input_ids.shape[1] :]
    return Real(folder, prompt.input_ids, tokenizer.decode(written, skip_special_tokens=True))


def check_equal_but_for_ties(plain: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Where they first differ, ``plain`` must find both tokens nearly as likely as each other.

    Activations of 8 bits beside massive ones turn such ties by their rounding.
    """
    if torch.equal(found, expected):
        return
    first = int((found != expected).nonzero()[0])
    with torch.no_grad():
        logits = plain(expected[None, :first]).logits[0, -1]
    gap = logits[expected[first]] - logits[found[first]]
    assert gap < 0.1 * logits.std(), f"{gap:.3f} apart at token {first}"


@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights_take_the_fast_path(real: Real, dtype: torch.dtype, experts: str) -> None:
    """Massive activations refuse nothing: every part is within the test's strict limits."""
    model = real.load(experts, dtype)
    path = model.hybrid_fast
    path.settle(model)
    assert path.path.fast, path.path.reason
    found = model.generate(real.ids, **GREEDY, pad_token_id=0)
    assert not path.refused
    if dtype == torch.float32:
        plain = real.load(experts, dtype, fast=False)
        expected = plain.generate(real.ids, **GREEDY, pad_token_id=0)
        check_equal_but_for_ties(plain, found[0], expected[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_answer_is_the_dense_models(real: Real, dtype: str) -> None:
    """Experts that are not quantized answer word for word as the dense model in float32 does."""
    model = HybridModel.from_pretrained(real.folder / "f32", dtype=dtype)
    assert model.chat(QUESTION, **GREEDY) == real.answer
    assert "Rome" in real.answer
    assert f"computed in {dtype}" in str(model.report())


def test_bfloat16_is_as_exact_as_transformers(real: Real) -> None:
    """Single tokens on the fast path are nearer to float32 than transformers' code in bfloat16."""
    exact = real.load("f32", torch.float32, fast=False)
    ids = exact.generate(real.ids, **GREEDY, pad_token_id=0)
    apart = []
    for options in ({}, {"fast": False}):
        model = real.load("f32", torch.bfloat16, **options)
        apart.append((_logits(model, ids) - _logits(exact, ids)).norm(dim=1).median())
    ours, theirs = apart
    assert ours <= theirs


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of single tokens after a prompt of 8, ``[T, V]`` float32."""
    output = model(input_ids=ids[:, :8], use_cache=True)
    rows = []
    for at in range(8, ids.shape[1]):
        given = cache_argument(returned_cache(output))
        output = model(input_ids=ids[:, at : at + 1], use_cache=True, **given)
        rows.append(output.logits[0].float())
    return torch.cat(rows)
