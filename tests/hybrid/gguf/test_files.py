"""GGUF files as they are found: split, of mixed types, damaged, or of something else."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_files import drawn, recipe, write_gguf
from hybrid import plan
from hybrid.cli import main
from hybrid.errors import CheckpointError, UnsupportedModelError, UsageError
from hybrid.formats.block import unpack_expert
from hybrid.formats.errors import HybridError
from hybrid.formats.matrix import pack, unpack
from hybrid.gguf.header import read_gguf
from hybrid.gguf.types import TYPES
from hybrid.weights.checkpoint import check, convert
from hybrid.weights.store import ExpertStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with experts, in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", recipe("qwen3moe"))


def test_types_are_those_of_the_gguf_package() -> None:
    """Every type has the block that ggml's own table has, under the same number and name."""
    for number, kind in TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert (kind.name, kind.values, kind.nbytes) == (
            known.name.lower(),
            *gguf.GGML_QUANT_SIZES[known],
        )


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16"])
def test_blocks_are_kept_as_they_are(kind: str, tmp_path: Path) -> None:
    """Experts and dense matrices have the file's numbers, bit for bit, in the file's format."""
    file = write_gguf(tmp_path / "tiny.gguf", recipe("qwen3moe"), matrices=kind)
    told: list[str] = []
    convert(file, tmp_path / "out", tell=told.append)
    assert told == []
    store = ExpertStore.open(tmp_path / "out", verify=True)
    record = store.index.layers[1]
    shape = record.shape(store.index.format)
    parts = unpack_expert(shape, store.blocks(record)[3, : shape.block_bytes])
    assert shape.formats == (kind.lower(), kind.lower())
    assert parts.gate is not None
    for part, values in (("gate", parts.gate), ("up", parts.up), ("down", parts.down)):
        name = f"blk.1.ffn_{part}_exps.weight"
        weights = drawn(name, recipe("qwen3moe")["tensors"][name])
        assert np.array_equal(values, _as_stored(weights[3], kind))
    if kind == "BF16":
        return  # ordinary tensors
    rows, cols = store.index.dense["model.layers.1.self_attn.v_proj"]
    packed = _tensor(tmp_path / "out", "model.layers.1.self_attn.v_proj.packed")
    expected = _as_stored(drawn("blk.1.attn_v.weight", [rows, cols]), kind)
    assert np.array_equal(unpack(packed, rows, cols, kind.lower()), expected)


def _as_stored(weights: np.ndarray, kind: str) -> np.ndarray:
    known = gguf.GGMLQuantizationType[kind]
    return gguf.dequantize(gguf.quantize(weights, known), known)


def _tensor(directory: Path, key: str) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")[key]


def test_what_has_no_format_is_quantized_anew(tmp_path: Path) -> None:
    """Types without kernels are told in one line, with what they become."""
    file = write_gguf(tmp_path / "tiny.gguf", recipe("deepseek2"), matrices="Q8_0")
    assert check(file).notes == [
        "quantized anew, for no kernels take what the file has: q8_0, transposed, to q8_0"
    ]


def _wide() -> dict[str, Any]:
    """A recipe whose rows are whole super-blocks."""
    made = recipe("qwen3moe")
    widths = {"embedding_length": 256, "expert_feed_forward_length": 256}
    made["metadata"] |= {f"qwen3moe.{key}": value for key, value in widths.items()}
    for name, shape in made["tensors"].items():
        wide = [256 if size == 64 else size for size in shape]
        made["tensors"][name] = [256 if size == 32 and "_exps" in name else size for size in wide]
    for name in ("attn_k", "attn_v"):
        for layer in range(3):
            made["tensors"][f"blk.{layer}.{name}.weight"] = [64, 256]
    return made


def test_types_without_kernels_are_said_with_their_error(tmp_path: Path) -> None:
    """What the new format costs is told as it is; with --exact such a file is refused."""
    made = _wide()
    file = write_gguf(tmp_path / "tiny.gguf", made, matrices="TQ2_0")
    told: list[str] = []
    convert(file, tmp_path / "out", tell=told.append)
    assert told[0].endswith("tq2_0 to q4_k")
    errors = squares = 0.0
    for name, shape in made["tensors"].items():
        if len(shape) > 1 and shape[-1] == 256 and "gate_inp" not in name:
            were = _as_stored(drawn(name, shape), "TQ2_0").reshape(-1, 256)
            are = unpack(pack(were, "q4_k"), len(were), 256, "q4_k")
            errors += float(((are - were).astype(float) ** 2).sum())
            squares += float((were.astype(float) ** 2).sum())
    share = 100 * (errors / squares) ** 0.5
    assert told[1:] == [
        "100 % of the quantized weights are not exactly what was published: in q4_k they differ "
        f"by {share:.2g} % (root mean square)"
    ]
    with pytest.raises(UnsupportedModelError, match="--exact keeps them so: tq2_0 to q4_k"):
        convert(file, tmp_path / "exact", exact=True)
    assert not (tmp_path / "exact").exists()
    assert main(["convert", str(file), "--check", "--exact"]) == 2


def test_exactly_what_was_published(tmp_path: Path) -> None:
    """Blocks with kernels of their own pass --exact, and it takes no other format beside it."""
    file = write_gguf(tmp_path / "tiny.gguf", recipe("qwen3moe"), matrices="Q4_1")
    assert convert(file, tmp_path / "out", exact=True).format == "q4_1"
    with pytest.raises(UsageError, match="--exact keeps what was published, q8_0 was asked for"):
        convert(file, tmp_path / "other", experts="q8_0", exact=True)


def test_split_files(whole: Path, tmp_path: Path) -> None:
    """Any part names the model; without one of them there is none."""
    made_by, half = recipe("qwen3moe"), {}
    names = list(made_by["tensors"])
    for part, some in enumerate((names[:20], names[20:])):
        half[part] = write_gguf(
            tmp_path / f"tiny-{part + 1:05d}-of-00002.gguf",
            made_by | {"tensors": {name: made_by["tensors"][name] for name in some}},
            split__count=2,
            split__no=part,
            split__tensors__count=len(names),
        )
    for part in half.values():
        header = read_gguf(part)
        assert header.path == half[0]
        assert header.tensors.keys() == read_gguf(whole).tensors.keys()
    assert (
        plan(half[1], "cpu-only-laptop").request.model
        == plan(whole, "cpu-only-laptop").request.model
    )
    half[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 2 files .* tiny-00002-of-00002\.gguf"):
        read_gguf(half[0])
    shutil.copy(half[0], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="is one of 2 files of a model, and is not called so"):
        read_gguf(tmp_path / "alone.gguf")


def _cut(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:size]


def _big_endian(data: bytes) -> bytes:
    return data[:4] + struct.pack(">I", 3) + data[8:]


def _version(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 9) + data[8:]


def _unknown_type(data: bytes) -> bytes:
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    return data[:at] + struct.pack("<I", 99) + data[at + 4 :]


def _huge_text(data: bytes) -> bytes:
    return data[:24] + struct.pack("<Q", 1 << 60) + data[32:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut(0), "is no GGUF file: it has 0 bytes"),
        (_cut(300), "is cut short: it ends in its header, after 300 bytes"),
        (_cut(-4096), r"is cut short: \S+ lies at bytes"),
        (_big_endian, "is big-endian"),
        (_version, "is GGUF of version 9, versions 2 and 3 are read"),
        (_unknown_type, "output_norm.weight in a type of number 99, which is unknown"),
        (_huge_text, "has a damaged GGUF header"),
        (lambda data: b"version https://git-lfs" + data[:80], "is a Git LFS pointer"),
    ],
)
def test_damaged_files(
    whole: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    """One error that names the file, before anything is written."""
    file = tmp_path / "bad.gguf"
    file.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(HybridError, match=message) as caught:
        convert(file, tmp_path / "out")
    assert str(file) in caught.value.message
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__type": "adapter"}, "is a LoRA adapter, not a model"),
        ({"general__type": "mmproj"}, "is the projector of images"),
        ({"qwen3moe__pooling_type": 1}, "is an embedding model"),
        ({"general__architecture": "bert"}, "is an embedding model"),
        ({"general__architecture": "clip"}, "is a vision tower"),
        ({"general__architecture": "mystery"}, "is of the architecture 'mystery', which is not"),
    ],
)
def test_what_is_no_model_of_text(
    metadata: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by what it is, from its header: by plan, convert and run alike, with exit code 2."""
    file = write_gguf(tmp_path / "other.gguf", recipe("qwen3moe"), **metadata)
    for command in (
        ["plan", str(file), "--hardware", "cpu-only-laptop"],
        ["convert", str(file), "x"],
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        convert(file, tmp_path / "out")
    assert caught.value.hint


def test_settings_and_tensors_that_are_missing(tmp_path: Path) -> None:
    """A file that lacks a setting or a tensor is refused by its name."""
    made_by = recipe("qwen3moe")
    lacking = {k: v for k, v in made_by["metadata"].items() if k != "qwen3moe.context_length"}
    file = write_gguf(tmp_path / "a.gguf", made_by | {"metadata": lacking})
    with pytest.raises(CheckpointError, match="lacks settings of qwen3moe"):
        convert(file, tmp_path / "out")
    some = {k: v for k, v in made_by["tensors"].items() if k != "blk.1.attn_k.weight"}
    file = write_gguf(tmp_path / "b.gguf", made_by | {"tensors": some})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.self_attn\.k_proj"):
        convert(file, tmp_path / "out")


def test_plan_of_the_header(tmp_path: Path) -> None:
    """A plan knows the formats and the bytes of a file, and of what was converted from it."""
    file = write_gguf(tmp_path / "tiny.gguf", recipe("qwen3moe"), matrices="Q5_0")
    found = plan(file, "cpu-only-laptop").request
    assert (found.experts, found.dense) == ("q5_0", "q5_0")
    stored = [t.nbytes for t in read_gguf(file).tensors.values() if "_exps" not in t.name]
    assert found.dense_bytes == pytest.approx(sum(stored), rel=0.01)
    convert(file, tmp_path / "out")
    again = plan(tmp_path / "out", "cpu-only-laptop").request
    assert (again.experts, again.dense) == ("q5_0", "q5_0")
    assert again.dense_bytes == pytest.approx(found.dense_bytes, rel=0.1)


def test_folder_of_one_file(whole: Path, tmp_path: Path) -> None:
    """A folder that holds one GGUF model is that model; of several one has to be named."""
    shutil.copy(whole, tmp_path / "a.gguf")
    assert check(tmp_path).layers == 3
    assert plan(tmp_path, "cpu-only-laptop").request.model.name == "a"
    shutil.copy(whole, tmp_path / "b.gguf")
    (error,) = check(tmp_path).errors
    assert "holds 2 GGUF models: a.gguf, b.gguf" in error.message


def test_config_of_a_converted_file(whole: Path, tmp_path: Path) -> None:
    """What is converted is an ordinary directory, with tokenizer, template and end tokens."""
    file = write_gguf(
        tmp_path / "t.gguf", recipe("qwen3moe"), tokenizer__chat_template="{{ messages }}"
    )
    convert(file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [257],
        "bos_token_id": 256,
        "pad_token_id": 258,
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
