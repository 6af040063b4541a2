"""Conversion: every source layout, any interruption, little memory, an ordinary directory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints import edit_config, in_fp8_blocks, read_weights, write_big_mixtral, write_weights
from hybrid.cli import main
from hybrid.errors import CheckpointError, UsageError
from hybrid.formats.activations import round_activations
from hybrid.packed.dense import QuantizedEmbedding, QuantizedLinear
from hybrid.weights.checkpoint import convert
from hybrid.weights.expert_writer import _Block
from hybrid.weights.store import DATA_NAME, INDEX_NAME, ExpertStore
from tiny_families import families, tiny_config

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))


def logits(directory: Path, **options: Any) -> torch.Tensor:
    options.setdefault("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def save_random(kind: str, directory: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    config_kind, model_kind = families()[kind]
    config = tiny_config(config_kind, **changes)
    model = model_kind._from_config(config, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_result_is_an_ordinary_directory(tiny_model: Path, tmp_path: Path) -> None:
    """Config, tokenizer and dense weights are where Hugging Face has them; experts are not."""
    told: list[tuple[int, int, str]] = []
    result = convert(tiny_model, tmp_path / "dst", progress=lambda *args: told.append(args))
    names = {path.name for path in result.path.iterdir()}
    own = {"config.json", "model.safetensors", DATA_NAME, INDEX_NAME}
    assert names == own | {path.name for path in tiny_model.iterdir()}
    assert not any(".experts." in key for key in read_weights(result.path))
    config = json.loads((result.path / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((tiny_model / "config.json").read_text())
    assert settings == {
        "quant_method": "hybrid",
        "experts": "q4_0",
        "dense": None,
        "store": result.store,
    }
    assert AutoTokenizer.from_pretrained(result.path)("ab")["input_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    done, total, _ = told[-1]
    assert done == total
    assert [n for n, _, _ in told] == sorted(n for n, _, _ in told)
    assert (result.layers, result.experts, result.resumed_layers) == (2, 16, 0)


@pytest.mark.parametrize("block", [32, 48])
def test_fp8_blocks(block: int, tmp_path: Path) -> None:
    """fp8 in blocks, full (32) and ragged (48): the same logits as its dequantized weights."""
    src, meant = tmp_path / "src", tmp_path / "meant"
    for directory in (src, meant):
        save_random("deepseek_v3", directory)
    stored, wide = in_fp8_blocks(read_weights(src), block)
    assert sum(weight.dtype == torch.float8_e4m3fn for weight in stored.values()) > 48
    write_weights(src, stored)
    write_weights(meant, wide)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    edit_config(src, quantization_config=settings | {"activation_scheme": "dynamic"})
    expected = logits(meant)
    convert(src, tmp_path / "f32", experts="f32")
    torch.testing.assert_close(logits(tmp_path / "f32"), expected, rtol=1e-5, atol=1e-5)
    assert all(w.dtype == torch.float32 for w in read_weights(tmp_path / "f32").values())
    convert(src, tmp_path / "q8", experts="f32", dense="q8_0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q8")
    path = "model.layers.1.self_attn.o_proj"
    exact = wide[f"{path}.weight"]
    assert 0 < (model.get_submodule(path).weight - exact).abs().max() < 0.01 * exact.abs().max()


def test_mxfp4(tmp_path: Path) -> None:
    """gpt_oss as it is published: packed fp4 blocks, byte scales, transposed, interleaved."""
    src, meant = tmp_path / "src", tmp_path / "meant"
    for directory in (src, meant):
        save_random("gpt_oss", directory, intermediate_size=64)
    weights, wide = read_weights(src), read_weights(meant)
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = weights.pop(key).shape
        shape = (experts, rows, cols // 32, 16)
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape[:3], generator=generator, dtype=torch.uint8)
        weights |= {f"{key}_blocks": codes, f"{key}_scales": scales}
        wide[key] = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).contiguous()
    write_weights(src, weights)
    write_weights(meant, wide)
    edit_config(src, quantization_config={"quant_method": "mxfp4"})
    expected = logits(meant)
    convert(src, tmp_path / "f32", experts="f32")
    torch.testing.assert_close(logits(tmp_path / "f32"), expected, rtol=1e-5, atol=1e-5)


def test_odd_sizes(tmp_path: Path) -> None:
    """Sizes that fill neither strips nor groups."""
    model = save_random(
        "qwen3_moe", tmp_path / "src", hidden_size=40, moe_intermediate_size=19, num_local_experts=5
    )
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    convert(tmp_path / "src", tmp_path / "f32", experts="f32")
    torch.testing.assert_close(logits(tmp_path / "f32"), expected, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "src", tmp_path / "q8", experts="q8_0")
    assert 0 < (logits(tmp_path / "q8") - expected).abs().max() < 0.05


@pytest.mark.parametrize("size", [1 << 30, 1 << 12])
@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "dbrx", "nemotron_h", "gpt_oss"])
def test_pieces_make_the_whole(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces that an expert is read in, its bytes are the same."""
    save_random(kind, tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "whole", experts="q4_0", dense="q8_0")
    monkeypatch.setattr("hybrid.weights.weight_map.PIECE_BYTES", size)
    monkeypatch.setattr("hybrid.weights.expert_writer._VALUES", size)
    monkeypatch.setattr("hybrid.weights.dense_writer._CHUNK_BYTES", size)
    convert(tmp_path / "src", tmp_path / "pieces", experts="q4_0", dense="q8_0")
    assert content(tmp_path / "pieces") == content(tmp_path / "whole")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense", ["q8_0", "q4_0"])
def test_dense_quantized(dense: str, tied: bool, tmp_path: Path) -> None:
    """Linear layers, embedding and lm_head run on the kernels; routers and norms stay."""
    save_random("qwen3_moe", tmp_path / "src", tie_word_embeddings=tied)
    convert(tmp_path / "src", tmp_path / "dst", experts="f32", dense=dense)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, QuantizedLinear)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    worst = {"q8_0": 0.01, "q4_0": 0.15}[dense]
    for path in ("lm_head", "model.embed_tokens", "model.layers.1.self_attn.o_proj"):
        exact = original.get_submodule(path).weight
        found = model.get_submodule(path).weight
        assert 0 < (found - exact).abs().max() < worst * exact.abs().max()
    x = torch.randn(3, 64)
    rounded = torch.from_numpy(round_activations(x.numpy()))
    expected = rounded @ attention.q_proj.weight.T
    torch.testing.assert_close(attention.q_proj(x), expected, rtol=1e-4, atol=1e-5)
    rows = model.model.embed_tokens(IDS)
    torch.testing.assert_close(rows, model.model.embed_tokens.weight[IDS], rtol=0, atol=0)
    with pytest.raises(IndexError, match="token ids must be in"):
        model.model.embed_tokens(torch.tensor([96]))


def test_dense_bf16(tmp_path: Path) -> None:
    """Matrices become bfloat16, the directory says so, and the model is loaded as that."""
    save_random("qwen3_moe", tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", experts="f32", dense="bf16")
    weights = read_weights(tmp_path / "dst")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["model.norm.weight"].dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded sources are read, and large dense parts are written as shards with an index."""
    model = save_random("qwen3_moe", tmp_path / "src")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    monkeypatch.setattr("hybrid.weights.tensor_files.SHARD_BYTES", 40_000)
    convert(tmp_path / "sharded", tmp_path / "dst", experts="f32")
    assert len(list((tmp_path / "dst").glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(tmp_path / "dst"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("at", [1, 5, 9, 16, 17, 25, 10_000])
def test_killed_at_any_moment(at: int, tiny_model: Path, tmp_path: Path) -> None:
    """SIGKILL after any piece leaves no destination; the next run takes over and completes."""
    dst = tmp_path / "dst"
    child = os.fork()
    if child == 0:
        calls = iter(range(1, 100_000))

        def kill(*_: Any) -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        if at == 10_000:  # the last moment of all: everything is written but the name
            os.rename = Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        try:
            convert(tiny_model, dst, progress=kill)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert not dst.exists()
    result = convert(tiny_model, dst, verify=True)
    assert result.resumed_layers == {1: 0, 5: 0, 9: 1, 16: 1, 17: 2, 25: 2, 10_000: 2}[at]
    convert(tiny_model, tmp_path / "clean")
    assert content(dst) == content(tmp_path / "clean")
    assert {path.name for path in tmp_path.iterdir()} == {"dst", "clean"}


class _InterruptionError(Exception):
    pass


def interrupt(after: int) -> Callable[[int, int, str], None]:
    calls = iter(range(1, 100_000))

    def progress(*_: Any) -> None:
        if next(calls) == after:
            raise _InterruptionError

    return progress


def test_partial_of_another_plan_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    """What was begun in one format does not get into a destination of another."""
    with pytest.raises(_InterruptionError):
        convert(tiny_model, tmp_path / "dst", experts="q8_0", progress=interrupt(12))
    result = convert(tiny_model, tmp_path / "dst", experts="q4_0", verify=True)
    assert result.resumed_layers == 0


def test_foreign_partial_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    """A directory that only happens to have the name is not deleted."""
    (tmp_path / "dst.partial").mkdir()
    (tmp_path / "dst.partial" / "thesis").write_text("data")
    with pytest.raises(UsageError, match="was not made by a conversion"):
        convert(tiny_model, tmp_path / "dst")
    assert (tmp_path / "dst.partial" / "thesis").read_text() == "data"


def test_damaged_partial_layer_is_written_again(tiny_model: Path, tmp_path: Path) -> None:
    """A layer that the journal calls complete is believed only if its checksums agree."""
    with pytest.raises(_InterruptionError):
        convert(tiny_model, tmp_path / "dst", progress=interrupt(20))
    data = tmp_path / "dst.partial" / DATA_NAME
    raw = bytearray(data.read_bytes())
    raw[5000] ^= 1
    data.write_bytes(raw)
    journal = tmp_path / "dst.partial" / "conversion.jsonl"
    journal.write_text(journal.read_text() + '{"module": "mod')
    result = convert(tiny_model, tmp_path / "dst", verify=True)
    assert result.resumed_layers == 1


def test_two_conversions_of_one_destination(tiny_model: Path, tmp_path: Path) -> None:
    """The second does not write into the first one's files."""
    with (
        FileLock(str(tmp_path / "dst.lock")),
        pytest.raises(UsageError, match="another conversion is writing"),
    ):
        convert(tiny_model, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


MEASURE = """
import re, sys, hybrid.weights.checkpoint
from pathlib import Path
from transformers import MixtralForCausalLM

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
hybrid.weights.checkpoint.convert(sys.argv[1], sys.argv[2], experts=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory(tmp_path: Path) -> None:
    """Extra memory stays under 300 MB for 706 MB of Mixtral-8x7B's experts, 352 MB each.

    In bfloat16 a single expert, read and packed whole, would take more than that. (Not
    getrusage: what it reports begins with the peak of the process that started this one.)
    """
    size = write_big_mixtral(tmp_path / "src", experts=2, hidden=4096, intermediate=14336)
    assert size > 700e6
    command = [sys.executable, "-c", MEASURE, tmp_path / "src", tmp_path / "dst", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 20e6 < int(done.stdout) < 300e6


def test_verify_compares_with_published_digests(tiny_model: Path, tmp_path: Path) -> None:
    """A flipped bit in the source's data is found by the digest that the download left."""
    src = tmp_path / "src"
    convert_source = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    notes = src / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for name, data in convert_source.items():
        (src / name).write_bytes(data)
    digest = hashlib.sha256(convert_source["model.safetensors"]).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"commit\n{digest}\n1.0\n")
    convert(src, tmp_path / "good", verify=True)
    raw = bytearray(convert_source["model.safetensors"])
    raw[-1000] ^= 1
    (src / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        convert(src, tmp_path / "bad", verify=True)
    assert not (tmp_path / "bad").exists()


def test_command(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """``hybrid convert`` writes, tells on stderr, and refuses in one line with a hint."""
    arguments = ["convert", str(tiny_model), str(tmp_path / "dst"), "--experts", "q8_0"]
    assert main([*arguments, "--dense", "q8_0", "--verify"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "16 experts in 2 layers" in err
    assert ExpertStore.open(tmp_path / "dst").index.format == "q8_0"
    assert main(arguments) == 2
    assert "exists\nhint: choose another destination" in capfd.readouterr().err
    assert main(["convert", str(tiny_model), str(tmp_path / "x"), "--experts", "q5_x"]) == 2
    assert "choose one of: q4_0, q4_1, q5_0," in capfd.readouterr().err


def test_blocks_are_padded_with_zeros(tmp_path: Path) -> None:
    """The gap up to the next page is zero and part of the checksum."""
    with (tmp_path / "x").open("w+b") as file:
        block = _Block(file)
        block.write(np.arange(5, dtype=np.uint8))
        block.pad_to(16)
    data = (tmp_path / "x").read_bytes()
    assert data == bytes(range(5)) + bytes(11)
