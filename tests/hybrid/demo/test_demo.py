"""The shipped demo model: an ordinary directory, really trained, every expert in use."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybrid import HybridConfig
from hybrid.demo import demo_path, train
from hybrid.demo.corpus import is_held_out, stdlib_files
from hybrid.demo.evaluate import Evaluation, evaluate, windows
from hybrid.demo.muon import orthogonalise

# Held-out text differs between Python versions (the split is by path, the files are the running
# interpreter's), so the bound on the perplexity is the recorded one and a margin.
PERPLEXITY_MARGIN = 1.5
# What quantization may cost on the same text. Measured on all held-out text of Python 3.11: q8_0
# 0.02 %, q4_0 0.31 %. A wrong scale, nibble order or expert costs whole multiples.
Q8_0_COST = 0.002
Q4_0_COST = 0.01
EVALUATED_TOKENS = 8 * 1024


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: handing them between threads costs more than computing them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((demo_path() / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return [*stdlib_files(held_out=True).values()]


@pytest.fixture(scope="module")
def measure(tokenizer: Any, held_out: list[str]) -> Callable[..., Evaluation]:
    """Evaluate the shipped weights on held-out text; all arithmetic in float32."""

    def measure(**options: Any) -> Evaluation:
        model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32, **options)
        return evaluate(model, tokenizer, held_out, max_tokens=EVALUATED_TOKENS)

    return measure


@pytest.fixture(scope="module")
def plain(measure: Callable[..., Evaluation]) -> Evaluation:
    """The bf16 weights through plain transformers."""
    return measure()


def test_directory_is_an_ordinary_checkpoint() -> None:
    """Any tool that reads Hugging Face directories reads it: bf16 safetensors, nothing of ours."""
    names = {path.name for path in demo_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    config = AutoConfig.from_pretrained(demo_path())
    assert config.model_type == "qwen3_moe"
    assert not hasattr(config, "quantization_config")
    assert config.num_hidden_layers >= 6
    assert (config.num_experts, config.num_experts_per_tok) == (16, 4)
    weights = load_file(demo_path() / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_directory_is_small() -> None:
    """It stays within the 8 MB that a git clone is asked to carry."""
    assert sum(path.stat().st_size for path in demo_path().rglob("*")) < 8_000_000


def test_import_is_light() -> None:
    """Knowing where the model lies costs no framework import."""
    code = "import sys, hybrid.demo as d; d.demo_path(); print({'torch', 'numba'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_tokenizer_keeps_every_text(tokenizer: Any, text: str) -> None:
    """Byte-level: every text can be encoded and comes back whole, after the start token."""
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.bos_token + text


def test_chat_template_is_the_code_so_far(tokenizer: Any) -> None:
    """A conversation is one program from its start; nothing is added to its end."""
    messages = [
        {"role": "user", "content": "def f(n):"},
        {"role": "assistant", "content": "\n    return n"},
        {"role": "user", "content": "def g(n):"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    program = "def f(n):\n    return n\ndef g(n):"
    assert prompt == tokenizer.bos_token + program
    assert tokenizer.apply_chat_template(messages)["input_ids"] == tokenizer.encode(program)


def test_split_is_by_path_and_skips_what_is_not_library(tmp_path: Path) -> None:
    """Every valid source is on exactly one side, the one its path says; the rest is on neither."""
    kept = {f"package/module_{i}.py": f"x = {i}\n" for i in range(60)}
    for name, text in kept.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name in ("site-packages/a.py", "test/b.py", "package/tests/c.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("y = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    sides = {side: stdlib_files(held_out=side, root=tmp_path) for side in (False, True)}
    assert sides[False] | sides[True] == kept
    assert all(is_held_out(name) == side for side in sides for name in sides[side])
    assert sides[False]
    assert sides[True]


def test_recorded_held_out_files_are_held_out(record: dict[str, Any]) -> None:
    """What was held out when the weights were made is on the same side of the split today."""
    assert all(is_held_out(name) for name in record["held_out_files"])
    assert not set(record["held_out_files"]) & set(stdlib_files(held_out=False))


def test_windows_keep_order_and_end_documents(tokenizer: Any) -> None:
    """Windows side by side are the documents in order, each closed by the end token."""
    texts = ["def f(x):\n    return x\n" * 5, "import os\n" * 9]
    ids = windows(tokenizer, texts, 8).flatten().tolist()
    end = tokenizer.eos_token_id
    whole = [i for text in texts for i in (*tokenizer.encode(text, add_special_tokens=False), end)]
    assert ids == whole[: len(whole) // 8 * 8]
    assert windows(tokenizer, texts, 8, max_tokens=16).shape == (2, 8)
    with pytest.raises(ValueError, match="fewer than one window of 4096"):
        windows(tokenizer, texts, 4096)


@pytest.mark.usefixtures("one_thread")
def test_evaluate_agrees_with_a_token_by_token_twin(tokenizer: Any) -> None:
    """Perplexity and expert shares equal those of a loop that asks for one token at a time."""
    torch.manual_seed(1)
    model: Any = train.Training(Path("absent")).model
    rows = windows(tokenizer, ["def f(x):\n    return x\n" * 2], 6)
    routed = torch.zeros(6, 16)
    log_likelihoods = []
    for row in rows:
        for end in range(1, len(row)):
            with torch.inference_mode():
                logits = model.eval()(input_ids=row[None, :end]).logits[0, -1]
            log_likelihoods.append(logits.log_softmax(-1)[row[end]].item())
        with torch.inference_mode():
            output = model(input_ids=row[None], output_router_logits=True)
        for layer, scores in enumerate(output.router_logits):
            for token in scores:
                for expert in sorted(range(16), key=lambda e: -token[e])[:4]:
                    routed[layer, expert] += 1
    measured = evaluate(model, tokenizer, ["def f(x):\n    return x\n" * 2], context=6)
    assert measured.perplexity == pytest.approx(math.exp(-np.mean(log_likelihoods)), rel=1e-4)
    assert measured.tokens == len(log_likelihoods)
    np.testing.assert_allclose(measured.expert_shares, routed / routed.sum(1, True), atol=1e-6)


def test_every_expert_is_used(plain: Evaluation) -> None:
    """On text never trained on, no expert of any layer gets less than a quarter of its share."""
    low, high = plain.expert_share_range
    assert low > 0.25 / 16
    assert high < 3 / 16


def test_held_out_perplexity(plain: Evaluation, record: dict[str, Any]) -> None:
    """The shipped weights predict unseen Python about as well as was recorded."""
    assert record["held_out_perplexity"] < 19
    assert plain.perplexity < record["held_out_perplexity"] * PERPLEXITY_MARGIN


@pytest.mark.parametrize(("experts", "cost"), [("q8_0", Q8_0_COST), ("q4_0", Q4_0_COST)])
def test_quantized_perplexity(
    experts: str, cost: float, measure: Callable[..., Evaluation], plain: Evaluation
) -> None:
    """Through our store and kernels the model loses next to nothing, and is not the bf16 one."""
    quantized = measure(quantization_config=HybridConfig(experts=experts))
    assert quantized.tokens == plain.tokens
    assert quantized.perplexity != plain.perplexity
    assert quantized.perplexity < plain.perplexity * (1 + cost)


@pytest.mark.usefixtures("one_thread")
def test_continues_a_function(tokenizer: Any) -> None:
    """Greedy text after a ``def`` line is an indented body."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    ids = tokenizer("def fibonacci(n):", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.startswith("\n    ")
    assert not text[5:].isspace()


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (3, 8, 24), (3, 24, 8)])
def test_orthogonalise(shape: tuple[int, ...]) -> None:
    """Singular values come close to one, directions stay, and a stack is its matrices apart."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    core = left.mT @ result @ right.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3
    assert values.max() < 1.3
    torch.testing.assert_close(core, torch.diag_embed(values), atol=1e-4, rtol=0)
    if matrices.ndim == 3:
        apart = torch.stack([orthogonalise(matrix) for matrix in matrices])
        torch.testing.assert_close(result, apart)


def test_an_epoch_visits_every_window_once() -> None:
    """The batches of an epoch are disjoint, and another epoch has another order."""
    tokens = np.arange(11 * train.CONTEXT)
    steps = (len(tokens) // train.CONTEXT - 1) // train.BATCH
    epochs = []
    for epoch in range(2):
        batches = [train.batch_at(tokens, epoch * steps + step) for step in range(steps)]
        epochs.append(torch.cat(batches))
        assert len(epochs[-1].unique()) == epochs[-1].numel()
    assert not torch.equal(*epochs)


@pytest.mark.usefixtures("one_thread")
def test_interrupted_training_takes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, saved and gone on with, training reaches bit for bit the same weights."""
    monkeypatch.setattr(train, "CONTEXT", 32)
    tokens = np.random.default_rng(0).integers(0, train.VOCABULARY, 2000)
    straight = train.Training(tmp_path)
    straight.advance(tokens, 0.1)
    straight.save()
    resumed = train.Training(tmp_path)
    assert resumed.step == 1
    for training in (straight, resumed):
        training.advance(tokens, 0.2)
    expected = straight.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("one_thread")
def test_train_writes_a_model_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted there is only the partial directory; the same command then finishes it."""
    sources = {f"module_{i}.py": f"def f_{i}(x):\n    return x + {i}\n" for i in range(80)}
    monkeypatch.setattr(train, "stdlib_files", lambda held_out: sources)
    monkeypatch.setattr(train, "CONTEXT", 32)
    out = tmp_path / "model"
    arguments = ["train", "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "60"])
    advance = train.Training.advance

    def interrupted(self: train.Training, *given: Any) -> float:
        if self.step == 2:
            raise KeyboardInterrupt
        return advance(self, *given)

    monkeypatch.setattr(train.Training, "advance", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 130
    assert not out.exists()

    monkeypatch.setattr(train.Training, "advance", advance)
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "1e-6"])
    train.main()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in out.iterdir()} == {path.name for path in demo_path().iterdir()}
    assert json.loads((out / "training.json").read_text())["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.do_sample


def test_train_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing directory is not overwritten and no time is no training: exit code 2."""
    for arguments, message in [
        (["--out", str(tmp_path)], "exists"),
        (["--out", str(tmp_path / "new"), "--minutes", "0"], "above zero"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as stop:
            train.main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
