"""HybridModel: what it writes, what it refuses, what it reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import hybrid
from cpu_experts.jit.hostcpu import Processor
from hybrid.errors import CheckpointError, HybridError, StoreError, UsageError
from hybrid.ledger import slow_paths
from hybrid.session.generation_options import DEFAULT_NEW_TOKENS
from hybrid.session.model import HybridModel
from tiny_model import CONTEXT, TEMPLATE

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> HybridModel:
    return HybridModel.from_pretrained(tiny_model, threads=1)


@pytest.fixture
def chat_model(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> HybridModel:
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    return model


def from_transformers(model: HybridModel, prompt: str, **options: Any) -> str:
    """What transformers' own generate and decode make of ``prompt``."""
    inputs = model.tokenizer(prompt, return_tensors="pt")
    out = model.model.generate(**inputs, **GREEDY | options)
    return str(model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


def test_text_is_what_transformers_generates(model: HybridModel) -> None:
    """Text in, text out: the same as encoding, transformers' generate, decoding."""
    assert model.generate("def f", max_new_tokens=30, **GREEDY) == from_transformers(
        model, "def f", max_new_tokens=30
    )


def test_text_takes_an_attention_mask(model: HybridModel) -> None:
    """What tokenizers return beside the ids can be handed on."""
    mask = torch.ones(1, 5, dtype=torch.long)
    assert model.generate("def f", max_new_tokens=9, attention_mask=mask, **GREEDY) == (
        model.generate("def f", max_new_tokens=9, **GREEDY)
    )


def test_ids_give_what_transformers_gives(model: HybridModel) -> None:
    """Token ids pass through to transformers and its result comes back as it is."""
    ids = model.encode("abc")
    expected = model.model.generate(ids, max_new_tokens=5, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=5, **GREEDY), expected)
    assert torch.equal(model.generate(ids[0].tolist(), max_new_tokens=5, **GREEDY), expected)
    rich = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(rich.sequences, expected)


def test_pieces_join_to_the_text(model: HybridModel) -> None:
    """stream() and on_text tell the text of generate() in more than one piece."""
    whole = model.generate("x", max_new_tokens=40, **GREEDY)
    told: list[str] = []
    model.generate("x", max_new_tokens=40, on_text=told.append, **GREEDY)
    assert "".join(told) == whole
    assert list(model.stream("x", max_new_tokens=40, **GREEDY)) == told
    assert list(model.stream(model.encode("x")[0].tolist(), max_new_tokens=40, **GREEDY)) == told
    assert len(told) > 1


def test_sampling_repeats_with_the_seed(model: HybridModel) -> None:
    """torch's seed decides what is sampled."""
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate("a", max_new_tokens=20, do_sample=True))
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_before_a_stop_string(model: HybridModel) -> None:
    """A text result leaves the stop string out and generation really ends there."""
    torch.manual_seed(3)
    whole = model.generate("a", max_new_tokens=60, do_sample=True)
    stop = next(char for char in whole[5:] if char.isascii())
    torch.manual_seed(3)
    cut = model.generate("a", max_new_tokens=60, do_sample=True, stop_strings=[stop, "\0\0"])
    assert cut == whole[: whole.index(stop)]
    figures = model.report().figures
    assert "stop string" in figures["new_tokens"].source
    assert figures["new_tokens"].value < 60


def test_ids_keep_transformers_meaning_of_stop_strings(model: HybridModel) -> None:
    """With ids the stop string stays in the result; the tokenizer is given for the caller."""
    ids = model.encode("a")
    text = model.generate("a", max_new_tokens=30, **GREEDY)
    stop = next(char for char in text if char.isascii())
    out = model.generate(ids, max_new_tokens=30, stop_strings=stop, **GREEDY)
    assert model.tokenizer.decode(out[0, 1:]) == text[: text.index(stop) + 1]


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_is_told_everything(model: HybridModel) -> None:
    """transformers' streamers work: the prompt first, every id once, one end."""
    ids = model.encode("ab")
    for prompt in ("ab", ids):
        recorder = _Recorder()
        model.generate(prompt, max_new_tokens=6, streamer=recorder, **GREEDY)
        assert recorder.ids == model.generate(ids, max_new_tokens=6, **GREEDY)[0].tolist()
        assert recorder.ended == 1


def test_beam_search_gives_text_but_does_not_stream(model: HybridModel) -> None:
    """Beams end in transformers' text; asking for pieces of it is an error that says why."""
    text = model.generate("ab", max_new_tokens=8, num_beams=3, **GREEDY)
    assert text == from_transformers(model, "ab", max_new_tokens=8, num_beams=3)
    figures = model.report().figures
    assert figures["new_tokens"].value == 8
    assert figures["ttft_s"].value is None
    with pytest.raises(UsageError, match="beam search"):
        model.generate("ab", max_new_tokens=8, num_beams=3, on_text=print)


def test_prompt_lookup_streams_accepted_tokens_only(model: HybridModel) -> None:
    """With assisted decoding, several tokens a step, the text is still the greedy one."""
    told: list[str] = []
    text = model.generate(
        "ababab", max_new_tokens=24, prompt_lookup_num_tokens=3, on_text=told.append, **GREEDY
    )
    assert text == "".join(told) == model.generate("ababab", max_new_tokens=24, **GREEDY)


def test_a_generation_config_is_used_and_left_alone(model: HybridModel) -> None:
    """Limits come from the config given; the caller's object does not change."""
    config = GenerationConfig(max_new_tokens=7, do_sample=False)
    before = config.to_dict()
    model.generate("a", generation_config=config)
    assert model.report().figures["new_tokens"].value == 7
    assert config.to_dict() == before
    model.generate("abc", max_length=9, **GREEDY)
    assert model.report().figures["new_tokens"].value == 6


def test_text_has_a_default_length(model: HybridModel) -> None:
    """Without any limit a text gets the documented number of tokens, not transformers' 20."""
    model.generate("a", **GREEDY)
    figures = model.report().figures
    assert figures["new_tokens"].value == DEFAULT_NEW_TOKENS
    assert "max_new_tokens" in figures["new_tokens"].source


def test_prompts_that_cannot_be_continued(model: HybridModel) -> None:
    """No tokens, or no room: an error naming the numbers, before anything runs."""
    for call in (model.generate, model.stream):
        with pytest.raises(UsageError, match="0 tokens"):
            call("")
        with pytest.raises(UsageError, match=rf"{CONTEXT + 1} tokens .* {CONTEXT}\b"):
            call("x" * (CONTEXT + 1))
        with pytest.raises(UsageError, match=str(CONTEXT)):
            call("x" * CONTEXT)
    with pytest.raises(UsageError, match="0 tokens"):
        model.generate([])


def test_text_ends_where_the_context_does(model: HybridModel) -> None:
    """More new tokens than fit: the text ends at the context and the report says so."""
    model.generate("x" * (CONTEXT - 5), max_new_tokens=50, **GREEDY)
    figure = model.report().figures["new_tokens"]
    assert figure.value == 5
    assert "context full" in figure.source


def test_options_that_no_text_can_satisfy(model: HybridModel) -> None:
    """Several sequences and an empty stop string are refused by name."""
    with pytest.raises(UsageError, match="one sequence, 2 are"):
        model.generate("a", num_return_sequences=2, do_sample=True)
    with pytest.raises(UsageError, match="one sequence, 3 are"):
        list(model.stream(torch.ones(3, 2, dtype=torch.long)))
    for prompts in (["a", "b"], [[1, 2], [3]], {"a": 1}):
        with pytest.raises(UsageError, match="token ids"):
            model.generate(prompts)
    for limit, wanted in (({"max_new_tokens": 0}, "0"), ({"max_length": 1}, "-2")):
        with pytest.raises(UsageError, match=f"^{wanted} new tokens .* prompt of 3"):
            model.generate("abc", **limit)
    for ids in (5, torch.ones(1, 1, 3)):
        with pytest.raises(UsageError, match=r"they must be \[T\] or \[B, T\]"):
            model.generate(ids)
    with pytest.raises(UsageError, match="stop string"):
        model.generate("a", stop_strings=[""])


def test_chat_continues_the_rendered_template(chat_model: HybridModel) -> None:
    """chat() is generate() over the messages as the template writes them."""
    messages = [{"role": "user", "content": "hi"}]
    answer = chat_model.chat(messages, max_new_tokens=12, **GREEDY)
    assert answer == chat_model.generate("[user]hi\n[assistant]", max_new_tokens=12, **GREEDY)


def test_chat_needs_a_template(model: HybridModel) -> None:
    """A model that was not trained to chat says so instead of inventing a format."""
    with pytest.raises(UsageError, match="no chat template") as caught:
        model.chat([{"role": "user", "content": "hi"}])
    assert caught.value.hint


def test_leaving_a_stream_stops_the_model(model: HybridModel) -> None:
    """After a break the worker is gone and the model answers again."""
    for _ in model.stream("a", max_new_tokens=CONTEXT, **GREEDY):
        break
    assert not [t for t in threading.enumerate() if t.name == "hybrid-generate"]
    figures = model.report().figures
    assert "interrupted" in figures["new_tokens"].source
    assert figures["new_tokens"].value < CONTEXT - 1
    assert model.generate("a", max_new_tokens=3, **GREEDY)


def test_an_error_in_a_callback_reaches_the_caller(model: HybridModel) -> None:
    """A reader that fails ends generation with its own error."""

    def fail(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        model.generate("a", max_new_tokens=5, on_text=fail, **GREEDY)
    assert model.generate("a", max_new_tokens=3, **GREEDY)


def test_an_error_in_the_worker_reaches_the_reader(model: HybridModel) -> None:
    """stream() raises in the reader's thread what generate would have raised."""
    with pytest.raises(UsageError, match="stop string"):
        list(model.stream("a", stop_strings=""))


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


def test_converted_once_and_its_formats_stay(
    model: HybridModel, tiny_model: Path, hybrid_cache: Path, tmp_path: Path
) -> None:
    """An ordinary directory is converted into the cache once; a converted one loads as it is."""
    copies = list((hybrid_cache / "converted").glob("tiny-*/experts.bin"))
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
    copy = next((hybrid_cache / "converted").glob("tiny-*/experts.bin")).parent
    for name, error, match in (
        ("model.safetensors", CheckpointError, "weight file of .*cut-model"),
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
    for options in ({"experts": "q5_k"}, {"dense": "q5_k"}):
        with pytest.raises(HybridError, match="q5_k") as caught:
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


@pytest.mark.parametrize(
    ("there", "counted", "dtype", "told"),
    [
        ((), (), torch.float32, ""),
        ((), (), torch.bfloat16, "this processor does not multiply it natively"),
        ((), ("bf16",), torch.bfloat16, "HYBRID_SIMD counts on bf16"),
        ((), ("bf16",), torch.float32, ""),
        (("avx512bf16",), ("bf16",), torch.bfloat16, ""),
        (
            ("avx512bf16", "amx-bf16"),
            (),
            torch.float32,
            "hides those of this processor (amx, bf16)",
        ),
        (("avx512bf16", "amx-bf16"), ("bf16", "amx"), torch.bfloat16, ""),
    ],
)
def test_the_report_says_what_bfloat16_costs(
    there: tuple[str, ...],
    counted: tuple[str, ...],
    dtype: torch.dtype,
    told: str,
    tiny_model: Path,
    bf16_units: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computed without units, as if there were some, or without those that there are."""
    model = HybridModel.from_pretrained(tiny_model, dtype=dtype)
    levels = slow_paths.hostcpu.LEVELS
    vectors = levels[slow_paths.simd_level.LEVEL] | levels["avx2"]  # what emulation needs
    monkeypatch.setattr(slow_paths.hostcpu, "host_features", lambda: vectors | set(there))
    monkeypatch.setattr(slow_paths.simd_level, "EMULATED", False)
    bf16_units(*counted)
    found = [path for path in model.report().slow_paths if "bfloat16" in path.what]
    assert [told in path.reason for path in found] == [True] * bool(told)
    assert all(path.remedy for path in found)


def test_the_report_counts_and_names_its_sources(model: HybridModel) -> None:
    """Counts are those of the call, every figure has a source, and JSON can carry it all."""
    model.generate("abcd", max_new_tokens=9, **GREEDY)
    report = model.report()
    assert report.figures["prompt_tokens"].value == 4
    assert report.figures["new_tokens"].value == 9
    assert report.figures["store_bytes"].value == model.model.hybrid_store.index.nbytes
    assert all(figure.source for figure in report.figures.values())
    for name in ("ttft_s", "prompt_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"):
        assert report.figures[name].value > 0
    assert json.loads(json.dumps(report.to_dict()))["figures"]["new_tokens"]["value"] == 9
    assert "measured over 8 steps" in str(report)
    assert "1 (torch and kernels)" in str(report)


def test_the_report_names_slow_paths(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced SIMD level and gating outside the kernels are told, with reason and remedy."""
    level = slow_paths.simd_level.LEVEL
    monkeypatch.setattr(slow_paths.simd_level, "EMULATED", False)
    monkeypatch.setattr(slow_paths.hostcpu, "actual", slow_paths.hostcpu.processor)
    plain = [f"expert kernels at {level}"] if level == "portable" else []
    assert [path.what for path in model.report().slow_paths] == plain
    better = Processor("better", units=slow_paths.hostcpu.processor().units)
    monkeypatch.setattr(slow_paths.hostcpu, "actual", lambda: better)
    experts = model.model.model.layers[0].mlp.experts.hybrid_experts
    monkeypatch.setattr(experts, "own_gating", True)
    told = {path.what: path for path in model.report().slow_paths}
    assert list(told) == [f"expert kernels at {level}", "experts of 1 layers in three steps"]
    assert all(path.reason and path.remedy for path in told.values())
    assert "slow path" in str(model.report())


def test_slow_threads_are_a_slow_path(tiny_model: Path) -> None:
    """Where numba has no OpenMP (here: is told to do without), the report says what to install."""
    code = (
        "import sys; from hybrid.session.model import HybridModel;"
        " print(HybridModel.from_pretrained(sys.argv[1]).report())"
    )
    for layer, told in (("workqueue", True), ("omp", False)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tiny_model)],
            env=os.environ | {"NUMBA_THREADING_LAYER": layer},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("libgomp1" in done.stdout) == told


def test_a_fresh_model_reports_without_a_call(tiny_model: Path) -> None:
    """Before the first call the report says what runs and leaves out what was not measured."""
    report = HybridModel.from_pretrained(tiny_model).report()
    assert "ttft_s" not in report.figures
    assert report.figures["load_s"].value > 0


def test_the_package_offers_the_class() -> None:
    """``hybrid.HybridModel`` is this class, imported on first use."""
    assert hybrid.HybridModel is HybridModel


def test_a_prompts_progress_is_told(model: HybridModel) -> None:
    """``on_prompt`` hears of every piece of a prompt, whose end is the last."""
    heard: list[tuple[int, int]] = []
    model.generate(
        "x" * 1200,
        max_new_tokens=2,
        on_prompt=lambda at: heard.append((at.done, at.total)),
        **GREEDY,
    )
    assert heard == [(512, 1200), (1024, 1200), (1200, 1200)]
