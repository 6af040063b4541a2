"""Models whose matrices have several formats: from conversion to logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrid  # noqa: F401  # makes converted directories known to transformers
from hybrid.errors import UsageError
from hybrid.packed.dense import install_dense
from hybrid.packed.experts import experts_of
from hybrid.transformers_api import cache_argument, returned_cache
from hybrid.weights.checkpoint import convert
from hybrid.weights.store import ExpertStore

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Of a prompt, and of a token after it."""
    found = model(input_ids=IDS, use_cache=True)
    after = model(input_ids=IDS[:, -1:], **cache_argument(returned_cache(found)))
    return torch.cat((found.logits, after.logits), dim=1)


def test_down_keeps_a_format_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """Converted as UP+DOWN: formats that hold the checkpoint's numbers change nothing."""
    convert(tiny_model, tmp_path / "mixed", experts="bf16+f32")
    assert ExpertStore.open(tmp_path / "mixed").index.version == 2
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", dtype=torch.float32)
    assert {one.shape.format_name for one in experts_of(mixed)} == {"bf16+f32"}
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.testing.assert_close(_logits(mixed), _logits(plain), rtol=1e-3, atol=1e-3)


def test_an_unknown_half_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Of two formats, too."""
    with pytest.raises(UsageError, match=r"'q4_k\+q9'"):
        convert(tiny_model, tmp_path / "mixed", experts="q4_k+q9")


def test_dense_modules_of_several_formats(tiny_model: Path) -> None:
    """Each gets the format that the index has for it; one without any stays as it is."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    attention = "model.layers.0.self_attn"
    matrices = {f"{attention}.{name}": (64, 64) for name in ("q_proj", "o_proj")}
    matrices["model.embed_tokens"] = (256, 64)
    formats = {f"{attention}.q_proj": "q6_k", "model.embed_tokens": "q8_0"}
    install_dense(model, matrices, formats | {f"{attention}.o_proj": None})
    found = {path: getattr(model.get_submodule(path), "weight_format", "") for path in matrices}
    assert found == formats | {f"{attention}.o_proj": ""}
