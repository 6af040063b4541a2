"""Measures what weight formats cost a model on held-out text (``hybrid bench perplexity``).

A checkpoint is converted to one format after another, and each predicts the same windows of text,
as prompts and, fewer of them, one token at a time as text is written: those are other kernels. What
the first format predicts of prompts is the reference: the others are compared with it token by
token, in how likely the text is and in the whole distributions.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from hybrid.ask.dtypes import check_dtype
from hybrid.ask.formats import check_formats
from hybrid.bench.heldout import held_out_windows
from hybrid.bench.record import Told, provenance, untold
from hybrid.demo import demo_path
from hybrid.demo.evaluate import token_losses
from hybrid.errors import DiskSpaceError
from hybrid.ledger.residual import DECODE, PREFILL
from hybrid.loading import load_fast_model, set_threads
from hybrid.machine import host
from hybrid.model import Model
from hybrid.paths import expanded, temporary_folder
from hybrid.transformers_api import cache_argument, returned_cache
from hybrid.weights.checkpoint import convert
from hybrid.weights.importance import Importance
from hybrid.weights.progress import conversion_progress
from hybrid.weights.source import Source
from hybrid.weights.tokenizer import load_tokenizer
from planner.describe.context import longest_context

AS_IT_IS = "as it is"
"""Dense layers in no format of ours."""
_ROOM = "set TMPDIR to a larger disk, or"


def run(
    model: str | None = None,
    *,
    texts: Mapping[str, str] | None = None,
    formats: Sequence[str] = ("f32", "bf16", "q8_0", "q4_0"),
    dense: Sequence[str] = (),
    imatrix: Path | None = None,
    dtype: str = "auto",
    tokens: int = 8192,
    decode: int = 1024,
    context: int = 512,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure a checkpoint's perplexity in each weight format.

    Parameters
    ----------
    model
        Its directory; the demo model when None.
    texts
        Documents that it was not trained on, by their names; when None, those sources of Python's
        standard library that the demo model was not.
    formats
        Of the experts; the others are compared with the first.
    dense
        Formats of the dense layers: every one of ``formats`` is measured with each of them, too,
        after the dense layers as the checkpoint has them.
    imatrix
        An importance matrix, which weights are quantized with.
    dtype
        What dense layers that are not quantized are computed in: ``"auto"``, ``"float32"`` or
        ``"bfloat16"``.
    tokens, context
        How many are read, spread over the texts, in windows of ``context``.
    decode
        How many of them are also predicted one at a time, in whole windows, at least one; 0 for
        none.
    progress
        Called with a line about what is done next.
    finished
        Called with the record so far and a line after every result.

    Returns
    -------
    One record with a result for every format and ``phase``: ``perplexity`` of the predicted
    ``tokens``; ``ratio`` to the reference's over the same tokens, with its standard error;
    ``divergence``, Kullback and Leibler's, of the reference's distributions from these in nats
    (mean, median, 99th percentile); ``same_first``, the share of tokens for which both hold the
    same one most likely; what single tokens were computed by (``path``), and the calls that it
    ``refused``. The reference is what the first format predicts as prompts, with ``dtype``.

    Raises
    ------
    UsageError
        When a format is unknown, or the texts are shorter than one window.
    CheckpointError
        When the directory or the importance matrix cannot be read, or the directory is converted:
        it has one format then.
    DiskSpaceError
        When the folder for temporary files has too little room for a converted copy, or for the
        reference.
    """
    check_dtype(dtype)
    pairs = _pairs(formats, dense)
    importance = None if imatrix is None else Importance.read(expanded(imatrix))
    threads = set_threads(host.default_threads() if threads is None else threads)
    path = demo_path() if model in (None, "demo") else expanded(str(model))
    sizes = Source.open(path).config.get_text_config()
    context = min(context, longest_context(sizes.to_dict(), f"config of {path.name}") or context)
    documents = None if texts is None else [*texts.values()]
    rows = held_out_windows(load_tokenizer(path), documents, context, tokens)
    one_by_one = min(len(rows), max(1, decode // context)) if decode else 0
    results: list[dict[str, Any]] = []
    record = provenance("hybrid bench perplexity", threads) | {
        "model": "demo" if model is None else model,
        "family": None,
        "dtype": None,
        "texts": ["the held-out part of Python's standard library"] if texts is None else [*texts],
        "text_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "context": context,
        "imatrix": None if importance is None else importance.digest,
        "reference": _name(*pairs[0]),
        "results": results,
    }
    with temporary_folder("bench") as folder:
        reference = Reference(folder / "reference", (*rows.shape, sizes.vocab_size))
        for experts, packed in pairs:
            name = _name(experts, packed)
            with _converted(path, experts, packed, importance, dtype) as loaded:
                record["family"] = type(loaded).__name__
                record["dtype"] = str(loaded.dtype).removeprefix("torch.")
                for phase, count in ((PREFILL, len(rows)), (DECODE, one_by_one)):
                    if count == 0:
                        continue
                    found = Comparison(reference)
                    Model(loaded).fast.refused.clear()
                    for index, row in enumerate(rows[:count]):
                        progress(f"{name}, {phase}: window {index + 1} of {count}")
                        found.add(index, row, predict(loaded, row, phase))
                    results.append(
                        {"experts": experts, "dense": packed or AS_IT_IS, "phase": phase}
                        | found.result()
                        | {"path": str(Model(loaded).fast.path)}
                        | {"refused": dict(Model(loaded).fast.refused)}
                    )
                    finished(record, _in_words(results[-1]))
    return record


def _pairs(formats: Sequence[str], dense: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return what is measured: formats of experts and of dense layers, the reference first."""
    pairs = [(experts, packed) for packed in (None, *dense) for experts in formats]
    for pair in pairs:
        check_formats(*pair)
    return [*dict.fromkeys(pairs)]


def _name(experts: str, dense: str | None) -> str:
    return experts if dense is None else f"{experts} with dense {dense}"


@contextmanager
def _converted(
    path: Path, experts: str, dense: str | None, importance: Importance | None, dtype: str
) -> Iterator[Any]:
    """Load a checkpoint in these formats, from a copy that goes away again."""
    with temporary_folder("bench") as folder:
        copy = folder / path.resolve().name
        try:
            with conversion_progress(f"Converting to {_name(experts, dense)}") as told:
                convert(
                    path, copy, experts=experts, dense=dense, importance=importance, progress=told
                )
        except DiskSpaceError as error:
            raise DiskSpaceError(str(error), hint=f"{_ROOM} leave out {experts}") from error
        yield load_fast_model(copy, dtype=dtype)[0]


@torch.no_grad()
def predict(model: Any, row: Tensor, phase: str) -> Tensor:
    """Return log-probabilities ``[T, V]`` after every token of ``row``, in float32.

    In the phase ``"prefill"`` the tokens are one prompt; in ``"decode"`` they come one at a time,
    each after those before it, as if the model had written them.
    """
    # As generate() makes it for decoders with a fast path; others make the cache that they need.
    fast = Model(model).fast.path.fast
    cache = cache_argument(DynamicCache(config=model.config)) if fast else {}
    logits = []
    step = len(row) if phase == PREFILL else 1
    for start in range(0, len(row), step):
        output = model(input_ids=row[None, start : start + step], use_cache=True, **cache)
        cache = cache_argument(returned_cache(output))
        logits.append(output.logits[0])
    return torch.cat(logits).float().log_softmax(-1)


class Reference:
    """What is predicted first of every window, in a file: whole distributions are large.

    Parameters
    ----------
    path
        The file to make.
    shape
        Windows, their tokens and the vocabulary.

    Raises
    ------
    DiskSpaceError
        When the disk has no room for it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
        if needed > free:
            raise DiskSpaceError(
                f"{path.parent} has {free / 2**30:.2f} GiB free, the reference's predictions take "
                f"{needed / 2**30:.2f}",
                hint=f"{_ROOM} measure fewer tokens",
            )
        self._windows = np.memmap(path, np.float32, "w+", shape=shape)
        self._made = 0

    def of(self, index: int, predicted: Tensor) -> Tensor:
        """Return the reference's log-probabilities of a window: at first, ``predicted``."""
        if index == self._made:
            self._windows[index] = predicted.numpy()
            self._made += 1
        return torch.from_numpy(self._windows[index])


class Comparison:
    """Adds up, token by token, how predictions differ from the reference's."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._losses: list[Tensor] = []
        self._of_reference: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._same: list[Tensor] = []

    def add(self, index: int, row: Tensor, predicted: Tensor) -> None:
        """Take in window ``index``, tokens ``row`` ``[T]``, ``predicted`` ``[T, V]``."""
        expected = self._reference.of(index, predicted)
        self._losses.append(token_losses(predicted, row).double())
        self._of_reference.append(token_losses(expected, row).double())
        before, now = expected[:-1], predicted[:-1]
        self._divergences.append((before.exp() * (before - now)).sum(-1))
        self._same.append(before.argmax(-1) == now.argmax(-1))

    def result(self) -> dict[str, Any]:
        """Return what a record says of all windows so far."""
        losses, of_reference = torch.cat(self._losses), torch.cat(self._of_reference)
        more, divergences = losses - of_reference, torch.cat(self._divergences)
        ratio = more.mean().exp().item()
        return {
            "tokens": losses.numel(),
            "perplexity": losses.mean().exp().item(),
            "ratio": ratio,
            "ratio_error": ratio * more.std().item() / math.sqrt(more.numel()),
            "divergence": {
                "mean": divergences.mean().item(),
                "median": divergences.median().item(),
                "p99": divergences.quantile(0.99).item(),
            },
            "same_first": torch.cat(self._same).double().mean().item(),
        }


def _in_words(row: dict[str, Any]) -> str:
    dense = None if row["dense"] == AS_IT_IS else row["dense"]
    return (
        f"{_name(row['experts'], dense)}, {row['phase']}: perplexity {row['perplexity']:.3f}, "
        f"{row['ratio']:.4f} of the reference's"
    )


def perplexity_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    lines = [
        f"{result['model']} ({result['family']}), computed in {result['dtype']}, "
        f"windows of {result['context']} tokens; beside {result['reference']} in prefill",
        f"{'experts':<9}{'dense':<10}{'phase':<9}{'tokens':>7}{'perplexity':>12}"
        f"{'ratio':>9}{'':<10}{'divergence: median':>19}{'99 %':>10}{'same first':>12}",
    ]
    for row in result["results"]:
        divergence = row["divergence"]
        lines.append(
            f"{row['experts']:<9}{row['dense']:<10}{row['phase']:<9}{row['tokens']:>7}"
            f"{row['perplexity']:>12.3f}{row['ratio']:>9.4f} ± {row['ratio_error']:.4f} "
            f"{divergence['median']:>19.1e}{divergence['p99']:>10.1e}{row['same_first']:>12.1%}"
        )
    return "\n".join(lines)
