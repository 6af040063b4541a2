"""Collects what the inputs of a model's matrices are like: an importance matrix of a text.

The model reads the text in pieces. Every matrix is told the squares of what it multiplies; of
experts, those of the tokens that were sent to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.errors import UsageError
from hybrid.grafts import hook_before
from hybrid.loading import load_fast_model
from hybrid.packed.experts import LayerExperts, experts_of
from hybrid.paths import temporary_folder
from hybrid.weights.checkpoint import convert
from hybrid.weights.importance import Entry, name_of, name_of_experts, write_importance
from hybrid.weights.tokenizer import load_tokenizer

#: Tokens of a piece, as llama.cpp has them.
CHUNK = 512
#: What experts are kept in while the text is read: nearly what they were.
_FORMAT = "q8_0"


class _Sums:
    """Sums of squares of a matrix's inputs, or of those of a layer's experts."""

    def __init__(self, experts: int, cols: int) -> None:
        self.sums = np.zeros((experts, cols))
        self.counts = np.zeros(experts)

    def add(self, x: Tensor, expert: int = 0) -> None:
        """Add inputs ``[n, K]``."""
        values = x.detach().reshape(-1, x.shape[-1]).double()
        self.sums[expert] += values.square().sum(0).cpu().numpy()
        self.counts[expert] += len(values)

    def entry(self) -> Entry:
        return Entry(self.sums.astype(np.float32), self.counts.astype(np.float32))


def collect(
    src: Path,
    text: str,
    out: Path,
    *,
    called: str = "text",
    progress: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the importance matrix of a checkpoint and a text; return how many tokens were read.

    Parameters
    ----------
    src
        A directory with weights, or a GGUF file; it is converted to a copy that goes away again.
    text
        Of the kind that the model will write.
    out
        The file to make.
    called
        What the text is called there.
    progress
        Called with a line about what is done next.

    Raises
    ------
    UsageError
        When the text has fewer tokens than 2.
    """
    with temporary_folder("importance") as folder:
        progress(f"converting {src.name} to {_FORMAT}, to read the text with it")
        copy = folder / "model"
        convert(src, copy, experts=_FORMAT)
        encode = load_tokenizer(copy)
        ids = encode(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        if len(ids) < 2:
            raise UsageError(f"the text has {len(ids)} tokens", hint="give a longer one")
        model, _ = load_fast_model(copy, fast=False)
        sums: dict[str, _Sums] = {}
        pieces = ids.split(CHUNK)
        with _watched(model, sums), torch.no_grad():
            for number, piece in enumerate(pieces, 1):
                progress(f"reading piece {number} of {len(pieces)}")
                model(input_ids=piece[None], use_cache=False)
    entries = {name: found.entry() for name, found in sums.items()}
    write_importance(out, entries, text=called, chunks=len(pieces), chunk=CHUNK)
    return len(ids)


@contextmanager
def _watched(model: Any, sums: dict[str, _Sums]) -> Iterator[None]:
    """Have all matrices tell their inputs."""
    hooks = []
    for path, module in model.named_modules():
        if hasattr(module, "in_features") and ".experts." not in f".{path}.":
            hooks.append(hook_before(module, _teller(sums, name_of(path)), "adds up its inputs"))
    runners = [runner for runner in experts_of(model) if isinstance(runner, LayerExperts)]
    for runner in runners:
        runner.observe = _observer(sums, runner)
    try:
        yield
    finally:
        for hook in hooks:
            hook.undo()
        for runner in runners:
            runner.observe = None


def _teller(sums: dict[str, _Sums], name: str) -> Callable[[Any, Any], None]:
    def tell(module: Any, inputs: Any) -> None:
        x = inputs[0]
        sums.setdefault(name, _Sums(1, x.shape[-1])).add(x)

    return tell


def _observer(
    sums: dict[str, _Sums], runner: LayerExperts
) -> Callable[[int, Tensor, Tensor], None]:
    path, shape, count = runner.spec.path, runner.shape, len(runner.blocks)

    def observe(expert: int, x: Tensor, h: Tensor) -> None:
        parts = [("gate", x)] * shape.gated + [("up", x), ("down", h)]
        for part, inputs in parts:
            name = name_of_experts(path, part)
            found = sums.setdefault(name, _Sums(count, inputs.shape[-1]))
            found.add(inputs, expert)

    return observe
