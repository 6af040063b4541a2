"""Importance matrices: read, made of a text, and what weights lose with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import read_weights
from hybrid.cli import main
from hybrid.demo import demo_path
from hybrid.errors import CheckpointError
from hybrid.formats.block import unpack_expert
from hybrid.formats.errors import ShapeError
from hybrid.formats.matrix import pack, unpack
from hybrid.formats.registry import FORMATS
from hybrid.measure.importance import collect
from hybrid.weights.checkpoint import convert
from hybrid.weights.importance import Entry, Importance, name_of, write_importance
from hybrid.weights.store import ExpertStore

SEARCHED = [name for name, known in FORMATS.items() if known.weigh is not None and name != "q8_0"]
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 20


@pytest.mark.parametrize("fmt", SEARCHED)
def test_errors_go_where_they_count_least(fmt: str) -> None:
    """The error weighted by importance is smaller with it than without, for every format."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 512)).astype(np.float32)
    counts = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    without, with_them = (
        unpack(pack(w, fmt, importance=known), 64, 512, fmt) for known in (None, counts)
    )
    plain, weighed = (((found - w) ** 2 * counts).sum() for found in (without, with_them))
    most = {"nvfp4": 0.999, "mxfp4": 0.999, "int4_256": 0.99}.get(fmt, 0.97)
    assert weighed < most * plain


def test_inputs_that_are_never_seen_keep_their_weights() -> None:
    """An importance of 0 is a little; so is all of them, which is none."""
    w = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    counts = np.ones(256, np.float32)
    counts[64:128] = 0
    found = unpack(pack(w, "q4_k", importance=counts), 16, 256, "q4_k")
    assert np.abs(found - w)[:, 64:128].mean() < 0.1
    none = pack(w, "q4_k", importance=np.zeros(256, np.float32))
    assert np.abs(unpack(none, 16, 256, "q4_k") - w).mean() < 0.1
    with pytest.raises(ShapeError, match=r"256 inputs take float32 importances \[256\], got"):
        pack(w, "q4_k", importance=np.ones(255, np.float32))


def _inputs(directory: Path, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What transformers' own code gives some matrices of the demo, token by token."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    found: dict[str, list[torch.Tensor]] = {}
    layer = model.model.layers[1]

    def on_attention(module: Any, inputs: Any) -> None:
        found.setdefault("o", []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    def on_experts(module: Any, inputs: Any) -> None:
        hidden, chosen = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
        up = module.gate_up_proj
        for expert in range(len(up)):
            x = hidden[(chosen == expert).any(1)]
            gate, linear = (x @ up[expert].T).chunk(2, dim=-1)
            found.setdefault(f"x{expert}", []).append(x)
            found.setdefault(f"h{expert}", []).append(torch.nn.functional.silu(gate) * linear)

    layer.self_attn.o_proj.register_forward_pre_hook(on_attention)
    layer.mlp.experts.register_forward_pre_hook(on_experts)
    with torch.no_grad():
        for piece in ids.split(512):
            model(input_ids=piece[None])
    return found


def test_collected_of_a_text(tmp_path: Path) -> None:
    """Sums and counts are those of transformers' own code, but for the copy's 8 bits."""
    from hybrid.weights.tokenizer import load_tokenizer

    source, out = Path(demo_path()), tmp_path / "demo.imatrix.gguf"
    tokens = collect(source, TEXT, out, called="text")
    ids = load_tokenizer(source)(TEXT, return_tensors="pt", add_special_tokens=False).input_ids[0]
    assert tokens == len(ids)
    found = Importance.read(out)
    wanted = _inputs(source, ids)
    names = {"o": ("blk.1.attn_output.weight", 0)}
    names |= {f"x{e}": ("blk.1.ffn_gate_exps.weight", e) for e in range(16)}
    names |= {f"h{e}": ("blk.1.ffn_down_exps.weight", e) for e in range(16)}
    for key, (name, row) in names.items():
        x = torch.cat(wanted[key])
        entry = found.entries[name]
        assert abs(entry.counts[row] - len(x)) <= 0.02 * len(x) + 2  # close scores may flip
        if len(x) > 50:
            mean = x.double().square().mean(0).numpy()
            error = np.abs(entry.means(row) - mean).sum() / mean.sum()
            assert error < 0.05, (key, error)
    assert found.entries["blk.1.ffn_up_exps.weight"].sums.shape == (16, 128)


def test_read_by_llama_cpps_own_library(tmp_path: Path) -> None:
    """The file is one of llama.cpp's: type, keys, and shapes of its tensors."""
    entries = {"blk.0.ffn_up_exps.weight": Entry(np.ones((3, 32), np.float32), np.arange(3.0))}
    write_importance(tmp_path / "x.gguf", entries, text="some", chunks=2, chunk=512)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["some"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {
        "blk.0.ffn_up_exps.weight.in_sum2": [32, 3],
        "blk.0.ffn_up_exps.weight.counts": [1, 3],
    }
    means = Importance.read(tmp_path / "x.gguf").entries["blk.0.ffn_up_exps.weight"]
    assert means.means(0) is None
    assert (means.means(2) == 0.5).all()


def _entries() -> dict[str, Entry]:
    rng = np.random.default_rng(0)
    sums = np.exp(2 * rng.standard_normal((8, 64))).astype(np.float32)
    return {
        **{
            f"blk.{layer}.ffn_{part}_exps.weight": Entry(
                sums[:, : 64 if part != "down" else 32], np.full(8, 2, np.float32)
            )
            for layer in range(2)
            for part in ("gate", "up", "down")
        },
        name_of("model.layers.0.self_attn.q_proj"): Entry(sums[:1], np.ones(1, np.float32)),
    }


def test_conversions_use_it(tiny_model: Path, tmp_path: Path) -> None:
    """Each expert's matrices are packed with their own row, and what has nothing is said."""
    weights = read_weights(tiny_model)
    down = weights["model.layers.1.mlp.experts.3.down_proj.weight"].float().numpy()
    entries = _entries()
    for layer in range(2):
        name = f"blk.{layer}.ffn_down_exps.weight"
        rng = np.random.default_rng(layer)
        sums = np.exp(rng.standard_normal((8, down.shape[1]))).astype(np.float32)
        entries[name] = Entry(sums, np.ones(8, np.float32))
    file = tmp_path / "x.gguf"
    write_importance(file, entries, text="t", chunks=1, chunk=8)
    told: list[str] = []
    importance = Importance.read(file)
    options: dict[str, Any] = {"experts": "q4_k", "dense": "q4_k", "tell": told.append}
    convert(tiny_model, tmp_path / "with", importance=importance, **options)
    convert(tiny_model, tmp_path / "without", **options)
    stores = [ExpertStore.open(tmp_path / name) for name in ("with", "without")]
    assert stores[0].index.id != stores[1].index.id
    assert any("has nothing of" in line and "blk.0.attn_k.weight" in line for line in told)
    record = stores[0].index.layers[1]
    block = record.shape("q4_k")
    packed = unpack_expert(block, stores[0].blocks(record)[3][: block.block_bytes])
    counts = importance.entries["blk.1.ffn_down_exps.weight"].means(3)
    want = unpack(pack(down, "q4_k", importance=counts), *down.shape, "q4_k")
    np.testing.assert_array_equal(packed.down, want)


def test_files_that_are_something_else(tiny_model: Path, tmp_path: Path) -> None:
    """Another GGUF file, another model's matrix, and a name that is taken are refused."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general.type is None, not 'imatrix'"):
        Importance.read(tmp_path / "model.gguf")
    entries = {"blk.0.ffn_up_exps.weight": Entry(np.ones((3, 32), np.float32), np.ones(3))}
    write_importance(tmp_path / "x.gguf", entries, text="t", chunks=1, chunk=8)
    with pytest.raises(CheckpointError, match=r"ffn_up_exps.weight is \[3, 32\], the model takes"):
        convert(
            tiny_model,
            tmp_path / "dst",
            experts="q4_k",
            importance=Importance.read(tmp_path / "x.gguf"),
        )
    assert not (tmp_path / "dst").exists()


def test_commands(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """``hybrid convert`` makes one of a text, alone or on the way, and takes one."""
    text, file = tmp_path / "text.txt", tmp_path / "tiny.imatrix.gguf"
    text.write_text(TEXT)
    base = ["convert", str(tiny_model)]
    assert main([*base, "--collect-importance", str(text)]) == 2
    assert "makes the file that --imatrix names: none is named" in capfd.readouterr().err
    assert main([*base, "--collect-importance", str(text), "--imatrix", str(file)]) == 0
    assert "importance of inputs of" in capfd.readouterr().err
    assert main([*base, "--collect-importance", str(text), "--imatrix", str(file)]) == 2
    assert "exists" in capfd.readouterr().err
    words = [str(tmp_path / "dst"), "--experts", "q3_k", "--imatrix", str(file)]
    assert main([*base, *words]) == 0
    assert "as q3_k" in capfd.readouterr().err
    assert ExpertStore.open(tmp_path / "dst").index.source["importance"]
