"""Opening a HybridModel: threads, the converted copy, what is no model, the type of its layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hybrid.errors import CheckpointError, HybridError, StoreError, UsageError
from hybrid.session.model import HybridModel

GREEDY = {"do_sample": False}


def test_torch_and_kernels_use_the_same_threads(model: HybridModel) -> None:
    """Also in the thread that stream() runs the model in, where numba would start afresh."""
    seen: list[tuple[int, int]] = []

    class Look(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            seen.append((numba.get_num_threads(), torch.get_num_threads()))

        def end(self) -> None: ...

    list(model.stream("a", max_new_tokens=2, streamer=Look(), **GREEDY))
    assert set(seen) == {(1, 1)}


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_thread_counts_that_cannot_be(tiny_model: Path, threads: int) -> None:
    """The message names the number asked for and the most there can be."""
    with pytest.raises(
        UsageError, match=rf"threads is {threads}\b.*{numba.config.NUMBA_NUM_THREADS}"
    ):
        HybridModel.from_pretrained(tiny_model, threads=threads)


def test_a_default_is_never_too_many_threads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OMP_NUM_THREADS meant for other programs is no error: all that numba has are used."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    loaded = HybridModel.from_pretrained(tiny_model)
    assert loaded.threads == numba.config.NUMBA_NUM_THREADS


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_conversion_without_a_tokenizer(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that could write no text is refused before anything is written."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    src = shutil.copytree(tiny_model, tmp_path / "src")
    (src / name).write_text("[" * 9)
    with pytest.raises(CheckpointError, match=f"{name} is not valid JSON"):
        HybridModel.from_pretrained(src)
    for file in src.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="src has no tokenizer"):
        HybridModel.from_pretrained(src)
    assert not list(tmp_path.rglob("experts.bin*"))


def test_converted_once_and_its_formats_stay(
    model: HybridModel, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary directory is converted into the cache once; a converted one loads as it is."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    HybridModel.from_pretrained(tiny_model)
    copies = list((tmp_path / "cache" / "converted").glob(f"tiny-{'?' * 16}/experts.bin"))
    assert len(copies) == 1
    changed = copies[0].stat().st_mtime_ns
    HybridModel.from_pretrained(tiny_model)
    assert copies[0].stat().st_mtime_ns == changed
    moved = tmp_path / "moved"
    shutil.copytree(copies[0].parent, moved)
    loaded = HybridModel.from_pretrained(moved, verify=True)
    assert loaded.generate("a", max_new_tokens=9, **GREEDY) == model.generate(
        "a", max_new_tokens=9, **GREEDY
    )
    assert loaded.report().experts_format == "q4_0"
    with pytest.raises(UsageError, match=r"q4_0.*q8_0"):
        HybridModel.from_pretrained(moved, experts="q8_0")


def test_directories_that_hold_no_model(tmp_path: Path, tiny_model: Path) -> None:
    """Missing, empty, not a model, without a tokenizer: each is named, with a remedy."""
    empty = tmp_path / "empty"
    empty.mkdir()
    strange = tmp_path / "strange"
    shutil.copytree(tiny_model, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "no-such-kind"}))
    mute = tmp_path / "mute"
    shutil.copytree(tiny_model, mute)
    for file in mute.glob("tokenizer*"):
        file.unlink()
    for directory, match in (
        (tmp_path / "missing", "missing"),
        (empty, "empty"),
        (strange, "no-such-kind"),
        (mute, "no tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            HybridModel.from_pretrained(directory)
        assert caught.value.hint


def test_a_converted_directory_that_was_cut_short(
    model: HybridModel, hybrid_cache: Path, tmp_path: Path
) -> None:
    """Dense weights or experts that end early are a typed error, not half a model."""
    copy = next((hybrid_cache / "converted").glob(f"tiny-{'?' * 16}/experts.bin")).parent
    for name, error, match in (
        ("model.safetensors", CheckpointError, "cut-model.*model.safetensors is cut short"),
        ("experts.bin", StoreError, r"cut-experts.*should have \d+ bytes"),
    ):
        broken = tmp_path / f"cut-{name}"
        shutil.copytree(copy, broken)
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(error, match=match) as caught:
            HybridModel.from_pretrained(broken)
        assert caught.value.hint


def test_unknown_formats(tiny_model: Path) -> None:
    """The message lists the formats there are."""
    for options in ({"experts": "q5_x"}, {"dense": "q5_x"}):
        with pytest.raises(HybridError, match="q5_x") as caught:
            HybridModel.from_pretrained(tiny_model, **options)
        assert "q4_0" in str(caught.value.hint)


def test_dense_layers_compute_in_what_the_processor_multiplies(
    tiny_model: Path, either_processor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 only with native instructions, float32 elsewhere and where a model is small.

    What is asked for always.
    """
    assert HybridModel.from_pretrained(tiny_model).model.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32, "float32", "bfloat16"):
        found = HybridModel.from_pretrained(tiny_model, dtype=dtype).model.dtype
        assert f"{found}".endswith(f"{dtype}".removeprefix("torch."))
    monkeypatch.setattr("hybrid.machine.compute_dtype.SMALL", 100)
    model = HybridModel.from_pretrained(tiny_model)
    assert model.model.dtype == (torch.bfloat16 if either_processor else torch.float32)
    model = HybridModel.from_pretrained(tiny_model, dtype="float32")
    slow = [path for path in model.report().slow_paths if path.what == "dense layers in float32"]
    assert bool(slow) == either_processor


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.int8])
def test_other_types_are_refused(tiny_model: Path, dtype: Any) -> None:
    """By name, with those that there are."""
    with pytest.raises(UsageError, match=r"int8|float16") as caught:
        HybridModel.from_pretrained(tiny_model, dtype=dtype)
    assert "auto, float32, bfloat16" in str(caught.value.hint)
