"""A model with the fast path is moved, copied, interrupted and asked by several threads."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import hybrid.fast.dense_parts
from fast_models import (
    BATCH,
    PROMPT,
    open_model,
    opened,
    owned,
    packed_modules,
    save_family,
    write,
)
from hybrid.fast.attach import UNTESTED
from hybrid.ledger.slow_paths import slow_paths
from hybrid.machine import host
from hybrid.model import Model
from hybrid.packed.dense import (
    pack_linear,
    replace_modules,
    restore_dense,
)
from hybrid.weights.checkpoint import convert

pytestmark = pytest.mark.usefixtures("half_precision_caches")


@pytest.mark.parametrize("replace", [False, True])
def test_moving_and_casting(qwen_folder: Path, replace: bool) -> None:
    """The model is cast as if nothing were packed, and tested again afterwards."""
    model, plain = (
        opened(qwen_folder, replace),
        open_model(qwen_folder, fast=False),
    )
    write(model)
    model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    assert model.hybrid_fast.path == UNTESTED
    assert model.hybrid_fast.decoder is None
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    for each in (model, plain):
        each.to(torch.float32)
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.path.fast
    assert bool(packed_modules(model)) == replace


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stand_by_themselves(qwen_folder: Path, how: str, used: bool, replace: bool) -> None:
    """A copy writes the same text on its own path, trains and casts, whatever the original did."""
    model, plain = (
        opened(qwen_folder, replace),
        open_model(qwen_folder, fast=False),
    )
    names = [name for name, _ in model.named_parameters()]
    if used:
        write(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    for each in (twin, plain):
        each(input_ids=PROMPT, labels=PROMPT).loss.backward()
    assert [name for name, _ in twin.named_parameters()] == names
    for found, wanted in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(write(twin), write(plain))
    assert twin.hybrid_fast.path.fast
    again = copy.deepcopy(twin)
    again.to(torch.bfloat16)
    assert not packed_modules(again)
    assert again.lm_head.weight.dtype == torch.bfloat16


def _interrupted(code: Any, line: int, call: Callable[[], Any]) -> bool:
    """Run ``call`` with a KeyboardInterrupt before the given line that ``code`` comes to."""
    left = [line]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_interruptions_lose_no_weights() -> None:
    """Ctrl-C before any line of replacing or restoring: the weights come back all the same."""
    model: Any = nn.Module()
    model.tied, model.linear = nn.Linear(8, 16, bias=False), nn.Linear(8, 24, bias=False)
    model.other = nn.Linear(8, 16, bias=False)
    model.other.weight = model.tied.weight
    wanted = {name: value.clone() for name, value in model.state_dict().items()}

    def replace() -> None:
        replace_modules((model, name, pack_linear(getattr(model, name))) for name in wanted_names)

    wanted_names = ("tied", "other", "linear")
    for code, call in (
        (replace_modules.__code__, replace),
        (restore_dense.__code__, lambda: restore_dense(model)),
    ):
        line = 1
        while True:
            if call is not replace:
                replace()
            happened = _interrupted(code, line, call)
            restore_dense(model)
            assert not packed_modules(model)
            assert model.tied.weight is model.other.weight
            found = model.state_dict()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
            if not happened:
                break
            line += 1
        assert line > 8


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_first_text(
    qwen_folder: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while modules are replaced: they are back, and the next text is right."""
    model, plain = owned(qwen_folder), open_model(qwen_folder, fast=False)
    calls = [0]

    def stopped(places: Any) -> None:
        calls[0] += 1
        if after or calls[0] != 4:
            replace_modules(places)
        if calls[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(hybrid.fast.dense_parts, "replace_modules", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(model)
    monkeypatch.undo()
    assert not packed_modules(model)
    assert model.hybrid_fast.path == UNTESTED
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)
    half_way = owned(qwen_folder)
    replace_modules([(half_way, "lm_head", pack_linear(half_way.lm_head))])
    half_way.hybrid_fast.release(half_way)
    assert torch.equal(half_way.lm_head.weight, plain.lm_head.weight)


def test_copies_need_memory(
    qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the path is refused, with sizes and a remedy; what makes no copies needs none."""
    assert 0 < host.available_memory_bytes() <= psutil.virtual_memory().total
    model, plain = open_model(qwen_folder), open_model(qwen_folder, fast=False)
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 5000)
    assert torch.equal(write(model), write(plain))
    assert model.hybrid_fast.path.reason.startswith("copies of dense weights take 120.0 KiB")
    (slow,) = [slow for slow in slow_paths(Model(model)) if "copies" in slow.reason]
    assert "--dense q8_0" in slow.remedy
    write(replaced := owned(qwen_folder))
    assert replaced.hybrid_fast.path.fast
    save_family("qwen3_moe", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", experts="f32", dense="q8_0")
    quantized = open_model(tmp_path / "model")
    parameters = list(quantized.parameters())
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 0)
    write(quantized)
    assert quantized.hybrid_fast.path.fast, quantized.hybrid_fast.path.reason
    assert all(a is b for a, b in zip(quantized.parameters(), parameters, strict=True))


@pytest.mark.parametrize("replace", [False, True])
def test_texts_beside_batches(qwen_folder: Path, replace: bool) -> None:
    """A thread's batches, which transformers computes, while another's text tests the path."""
    model = opened(qwen_folder, replace)
    with torch.no_grad():
        wanted = model(input_ids=BATCH).logits
    errors: list[BaseException] = []
    over, begun = threading.Event(), threading.Event()

    @torch.no_grad()
    def batches() -> None:
        try:
            while not over.is_set():
                torch.testing.assert_close(model(input_ids=BATCH).logits, wanted)
                begun.set()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=batches, daemon=True)
    thread.start()
    begun.wait(30)
    try:
        texts = []
        for _ in range(4):
            texts.append(write(model, max_new_tokens=3))
            assert model.hybrid_fast.path.fast, model.hybrid_fast.path.reason
            model.hybrid_fast.release(model)
    finally:
        over.set()
        thread.join(30)
    assert not errors, errors
    assert all(torch.equal(text, texts[0]) for text in texts)
