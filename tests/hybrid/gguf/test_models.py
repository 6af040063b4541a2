"""Models of GGUF files compute what llama.cpp computes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gguf_files import CASES, PROMPT, llama_cpp_says, recipe, write_gguf
from hybrid import HybridModel

#: How far float32 sums in another order may be apart, of logits whose spread is about 1; llama.cpp
#: looks gelu up in a table of half precision.
_NEAR = {"gemma3": 2e-2}


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("*.json")))
def test_logits_and_text_are_llama_cpps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture: names, settings and what its writer did to weights are undone."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    made_by = recipe(name)
    file = write_gguf(tmp_path / f"{name}.gguf", made_by)
    model = HybridModel.from_pretrained(file, dtype="float32", vram=0)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model.model(ids).logits[0, -1].numpy()
    expected = np.array(made_by["logits"], np.float32)
    assert np.abs(logits - expected).max() < _NEAR.get(name, 1e-4)
    written = model.generate(
        ids, max_new_tokens=len(made_by["text"]), do_sample=False, eos_token_id=None
    )
    assert written[0, len(PROMPT) :].tolist() == made_by["text"]


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_recipes_are_what_llama_cpp_says(name: str, tmp_path: Path) -> None:
    """The logits and the text of recipes are llama.cpp's, where it is installed."""
    pytest.importorskip("llama_cpp")
    made_by = recipe(name)
    file = write_gguf(tmp_path / f"{name}.gguf", made_by)
    logits, text = llama_cpp_says(file, len(made_by["text"]))
    assert np.abs(logits[-1] - np.array(made_by["logits"])).max() < 1e-4
    assert text == made_by["text"]
