"""What the fast path computes is held against transformers' code before it is relied on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid.fast.selftest
from cpu_experts.decoder.decoder import Decoder
from fast_models import (
    RANKS,
    install_fast_decode,
    load_family,
)
from hybrid.fast.attach import DecodePath
from hybrid.session.model import HybridModel
from tiny_families import VOCAB

pytestmark = pytest.mark.usefixtures("half_precision_caches")


def test_an_unfit_family_keeps_its_code_and_says_why(tmp_path: Path) -> None:
    """A norm behind the experts has no kernel: nothing stays replaced, the reason is kept."""
    model = load_family("axk1", tmp_path)
    weight = model.lm_head.weight
    path = install_fast_decode(model)
    assert not path.fast
    assert "post_mlp_layernorm" in path.reason
    assert model.lm_head.weight is weight
    assert weight.shape == (VOCAB, 64)
    assert str(path).startswith("transformers (the experts' block (AXK1MoE) has")


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_found_and_told(
    massive: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A decoder that computes something else (its scores unscaled) is not used.

    What massive activations do to the size of a layer's numbers hides nothing.
    """
    model = load_family("qwen3_moe", tmp_path, dtype=dtype, massive=massive)
    read, wrong = hybrid.fast.selftest.read_decoder, 0 if massive else 1

    def misread(model: Any, **options: Any) -> Any:
        model.model.layers[wrong].self_attn.scaling *= 2
        decoder = read(model, **options)
        model.model.layers[wrong].self_attn.scaling /= 2
        return decoder

    monkeypatch.setattr(hybrid.fast.selftest, "read_decoder", misread)
    path = install_fast_decode(model)
    assert not path.fast
    assert f"layer {wrong} differs from transformers' by" in path.reason
    assert f"layer {wrong} differs" in capsys.readouterr().err
    assert model.hybrid_fast.decoder is None


def test_the_report_names_the_path(tiny_model: Path) -> None:
    """The report says what computes single tokens, and lists it as slow where it is."""
    model = HybridModel.from_pretrained(tiny_model)
    assert "one-token kernels (tested: every part within" in str(model.report())
    model.model.hybrid_fast.path = DecodePath(False, "some reason")
    assert "single tokens in transformers' code: some reason" in str(model.report())


@pytest.mark.parametrize("spoilt", [(0, 2), (2,)])
def test_a_single_token_that_is_no_number_is_found(
    spoilt: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer counts by the middle one of its tokens, but NaN is none."""
    model = load_family("qwen3_moe", tmp_path)
    real, calls = Decoder.layer_step, 0

    def step(self: Any, index: int, *args: Any) -> Any:
        nonlocal calls
        found = real(self, index, *args)
        if index == 1:
            calls += 1
            found = found * float("nan") if calls - 1 in spoilt else found
        return found

    monkeypatch.setattr(Decoder, "layer_step", step)
    path = install_fast_decode(model)
    assert calls == 3
    assert not path.fast
    assert "layer 1 differs from transformers' by inf" in path.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_off_is_found(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits 5 % too large are wrong in either type, whatever bfloat16 rounds."""
    model = load_family("qwen3_moe", tmp_path, dtype=dtype)
    real = Decoder.head_step

    def step(self: Any, x: Any, logits: Any) -> None:
        real(self, x, logits)
        logits *= 1.05

    monkeypatch.setattr(Decoder, "head_step", step)
    path = install_fast_decode(model)
    assert not path.fast
    assert "the head differs from transformers' by 0.05" in path.reason


@pytest.mark.parametrize(
    ("part", "told"), [("layer_tokens", "a step through layer 0"), ("head_tokens", "the head in")]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_step_that_is_off_is_found(
    family: str, part: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single tokens are right, but what several at a step become is 5 % too large."""
    model = load_family(family, tmp_path, **(RANKS if family == "deepseek_v3" else {}))
    real = getattr(Decoder, part)

    def layer(self: Any, index: int, x: Any, *args: Any) -> Any:
        return x + 1.05 * (real(self, index, x, *args) - x)

    def head(self: Any, x: Any, logits: Any) -> None:
        real(self, x, logits)
        logits *= 1.05

    monkeypatch.setattr(Decoder, part, layer if part == "layer_tokens" else head)
    path = install_fast_decode(model)
    assert not path.fast
    assert told in path.reason
    assert "differs from transformers' by 0.05" in path.reason
