"""A model that was used here goes on in another process: pickled, spawned, forked."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from cpu_experts.errors import BackendError
from cpu_experts.ffn import linear
from fast_models import converted, open_model, write, written
from hybrid.session.model import HybridModel
from hybrid.weights.checkpoint import convert

READ = """
import sys, hybrid, torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.tensor([[5, 9, 33]])
options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
print(model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist())
"""
IDS = torch.tensor([[5, 9, 33]])


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that has written."""
    model = open_model(converted("qwen3_moe", tmp_path_factory.mktemp("used")))
    write(model, IDS)
    return model


def test_saved_and_loaded_elsewhere(used: Any, tmp_path: Path) -> None:
    """A process that only imports hybrid writes the same with it."""
    torch.save(used, tmp_path / "model.pt")
    command = [sys.executable, "-c", READ, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(write(used, IDS, max_new_tokens=4).tolist())


def test_sent_to_a_spawned_worker(used: Any) -> None:
    """As an argument of a function that it calls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(written, (used, IDS.tolist()))
    assert found == write(used, IDS).tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_after_use(used: Any) -> None:
    """A child computes the same in torch; kernels that are called there raise, with the remedy."""
    wanted = write(used, IDS)
    threads = torch.get_num_threads()
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        torch.set_num_threads(1)
        try:
            theirs.send(write(used, IDS).tolist())
            x = torch.zeros(1, 1).numpy()
            linear(x, torch.zeros(64, dtype=torch.uint8).numpy(), "f32", None, x)
        except BackendError as error:
            theirs.send((str(error), error.hint))

    process = context.Process(target=child)
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == wanted.tolist()
        assert ours.poll(60)
        message, hint = ours.recv()
    finally:
        process.kill()
        process.join()
    assert "forked" in message
    assert "spawn" in hint
    assert torch.get_num_threads() == threads
    assert torch.equal(write(used, IDS), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_while_another_thread_writes(tiny_model: Path, tmp_path: Path) -> None:
    """The thread that has its turn stays behind; the child does not wait for it."""
    convert(tiny_model, tmp_path / "model", experts="f32")
    model = HybridModel.from_pretrained(tmp_path / "model", threads=1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate([5, 9, 33], **options)
    writing, forked = threading.Event(), threading.Event()

    class Waiting(BaseStreamer):
        def put(self, value: Any) -> None:
            writing.set()
            assert forked.wait(60)

        def end(self) -> None:
            """Nothing is left to do."""

    held = threading.Thread(
        target=model.generate, args=([5, 9, 33],), kwargs=options | {"streamer": Waiting()}
    )
    held.start()
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        torch.set_num_threads(1)
        theirs.send(model.generate([5, 9, 33], **options).tolist())

    assert writing.wait(60)
    process = context.Process(target=child)
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == wanted.tolist()
    finally:
        process.kill()
        process.join()
        forked.set()
        held.join()
