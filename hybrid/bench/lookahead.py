"""Measures how many of later layers' experts are foretold (``hybrid bench lookahead``).

Held-out text goes through the model window by window, and every layer's choice is compared with
what the routers' lookahead said of it one, two and three layers before, with what the token before
had chosen, and with the experts that the whole text uses most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.anatomy.survey import replaced_experts
from hybrid.bench.heldout import held_out_windows
from hybrid.bench.record import Told, provenance, untold
from hybrid.loading import set_threads
from hybrid.machine import host
from hybrid.model import Model
from hybrid.session.model import HybridModel
from hybrid.sharing.predictor import DISTANCES, Lookahead

Ids = NDArray[np.integer[Any]]


def run(
    model: str | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokens: int = 16_384,
    context: int = 512,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure the lookahead's recall on text.

    Parameters
    ----------
    model
        A directory; the demo model when None.
    texts
        Documents that the model was not trained on; when None, those sources of Python's standard
        library that the demo model was not.
    tokens, context
        How many are read, spread over the texts, in windows of ``context``.
    progress
        Called with a line about what is done next.
    finished
        Called with the record so far and a line after every window.

    Returns
    -------
    One record. ``recall`` by distance: the share of the experts chosen by a router that are among
    as many foretold that many layers before; ``recall_by_layer`` ``[L][3]`` the same for each
    layer, None where nothing is foretold; ``previous_token``: the share that the token before had
    chosen; ``popular``: the share among the layer's most used of this text, known afterwards;
    ``chance``: the share that a blind guess has.

    Raises
    ------
    UsageError
        When the texts are shorter than one window.
    """
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    progress("loading")
    runtime = HybridModel.from_pretrained(model, threads=threads)
    loaded = runtime.model
    rows = held_out_windows(runtime.tokenizer, texts, context, tokens)
    specs = [runner.spec for runner in Model(loaded).layers]
    lookahead = Lookahead.discover(loaded, specs, sample=context)
    kept = Comparison(lookahead, len(specs))
    about = provenance("hybrid bench lookahead", threads) | {
        "model": "demo" if model is None else model,
        "family": type(loaded).__name__,
        "experts_format": Model(loaded).index.experts_format,
    }
    result: dict[str, Any] = {}
    try:
        with replaced_experts(specs, kept.experts), torch.no_grad():
            for index, row in enumerate(rows):
                progress(f"window {index + 1} of {len(rows)}")
                loaded(input_ids=row[None], use_cache=False)
                tokens = (index + 1) * row.numel()
                result = about | kept.record(tokens, context, specs[0].experts, lookahead.reason)
                finished(result, _in_words(f"window {index + 1} of {len(rows)}", result))
    finally:
        lookahead.remove()
    return result


def _in_words(name: str, result: dict[str, Any]) -> str:
    share = result["recall"]["1"]
    found = "none" if share is None else f"{share:.1%}"
    return f"{name}: {found} of the next layer's experts are foretold so far"


class Comparison:
    """Sits in the experts' place: asks the lookahead, and keeps what the routers chose.

    Attributes
    ----------
    chosen
        ``[L]`` lists of ids ``[T, A]``, one for each window.
    """

    def __init__(self, lookahead: Lookahead, layers: int) -> None:
        self.chosen: list[list[Ids]] = [[] for _ in range(layers)]
        self._lookahead = lookahead
        self._waiting: dict[tuple[int, int], Ids] = {}
        self._right = np.zeros((layers, DISTANCES))
        self._wanted = np.zeros((layers, DISTANCES))

    def experts(
        self, layer: int, real: Callable[..., Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Run a layer's experts as they are, between learning and foretelling."""
        logits = self._lookahead.scores(layer, hidden)
        chosen = ids.cpu().numpy()
        self.chosen[layer].append(chosen)
        self._lookahead.learn(layer, chosen)
        for distance in range(1, DISTANCES + 1):
            foretold = self._waiting.pop((layer, distance), None)
            if foretold is not None:
                self._right[layer, distance - 1] += _shared(chosen, foretold)
                self._wanted[layer, distance - 1] += chosen.size
        if logits is not None:
            for ahead, order in self._lookahead.ranking(layer, logits.cpu().numpy()):
                self._waiting[ahead, ahead - layer] = order[:, : chosen.shape[1]]
        return real(hidden, ids, weights)

    def record(self, tokens: int, context: int, experts: int, reason: str | None) -> dict[str, Any]:
        """Return what a record says of it after so many tokens."""
        top_k = self.chosen[0][0].shape[1]
        return {
            "tokens": tokens,
            "context": context,
            "layers": len(self.chosen),
            "experts": experts,
            "top_k": top_k,
            "recall": self.recall(),
            "recall_by_layer": self.recall_by_layer(),
            "previous_token": self.previous_token(),
            "popular": self.popular(),
            "chance": top_k / experts,
            "not_predicted": reason,
        }

    def recall(self) -> dict[str, float | None]:
        """Return recall by distance over all layers; None where nothing was foretold."""
        pairs = zip(self._right.sum(axis=0), self._wanted.sum(axis=0), strict=True)
        return {str(at): float(r / w) if w else None for at, (r, w) in enumerate(pairs, 1)}

    def recall_by_layer(self) -> list[list[float | None]]:
        """Return recall by layer and distance; None where nothing was foretold."""
        return [
            [float(r / w) if w else None for r, w in zip(right, wanted, strict=True)]
            for right, wanted in zip(self._right, self._wanted, strict=True)
        ]

    def previous_token(self) -> float:
        """Return the share of choices that the token before had made too."""
        pairs = [(ids[1:], ids[:-1]) for layer in self.chosen for ids in layer]
        return float(
            sum(_shared(now, before) for now, before in pairs) / sum(now.size for now, _ in pairs)
        )

    def popular(self) -> float:
        """Return the share of choices among each layer's A most chosen experts."""
        counts = [np.sort(np.bincount(np.concatenate(layer).ravel())) for layer in self.chosen]
        top_k = self.chosen[0][0].shape[1]
        return float(sum(c[-top_k:].sum() for c in counts) / sum(c.sum() for c in counts))


def _shared(chosen: Ids, foretold: Ids) -> int:
    """Count the ids of ``chosen``, ``[T, A]``, that are in the same row of ``foretold``."""
    return int((chosen[:, :, None] == foretold[:, None, :]).any(-1).sum())


def lookahead_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    rows = [
        (f"{distance} layers early" if distance != "1" else "1 layer early", share)
        for distance, share in result["recall"].items()
    ]
    rows += [
        ("same as the token before", result["previous_token"]),
        ("the layer's most used, in hindsight", result["popular"]),
        ("a blind guess", result["chance"]),
    ]
    head = (
        f"{result['model']} ({result['family']}), {result['layers']} layers, "
        f"{result['top_k']} of {result['experts']} experts, {result['tokens']} tokens"
    )
    return "\n".join(
        [head, "share of the chosen experts that are foretold"]
        + [f"  {name:<36}{'none' if share is None else f'{share:.1%}':>7}" for name, share in rows]
    )
