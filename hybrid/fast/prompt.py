"""Prompts of a model with the fast path: in pieces, into the cache that single tokens use.

transformers' code walks through the layers; attention between the projections is one compiled
call a layer that reads and writes the one-token kernels' cache. Memory besides the cache is
that of one piece, whatever the prompt's length, and after every piece progress can be told.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cpu_experts.decoder.decoder import Cache, Decoder
from hybrid.grafts import fast_path_of, redirect_forward, restore_forward

#: Tokens of a prompt that are computed at a time.
PIECE = 512
#: A bar is shown for prompts of at least this many tokens.
_LONG = 2 * PIECE

OnPrompt = Callable[["PromptProgress"], None]


@dataclass(frozen=True)
class PromptProgress:
    """How far a prompt is.

    Attributes
    ----------
    done, total
        Tokens computed, and tokens to compute in all.
    elapsed_s
        Since the prompt began.
    """

    done: int
    total: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        """Rate so far; 0 before the first piece is done."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        """Time left at the rate so far; infinite before the first piece is done."""
        rate = self.tokens_per_s
        return (self.total - self.done) / rate if rate else float("inf")


class Joined(Protocol):
    """The cache of one sequence, as attention of a prompt adds to it."""

    @property
    def kv(self) -> Cache: ...

    def advance_layer(self, index: int, count: int) -> None: ...


class Piece:
    """Tokens on their way through the layers: attention of all of them, layer by layer.

    Parameters
    ----------
    decoder
        The kernels.
    sequence
        The cache that the tokens join.
    cos, sin
        Rotary embedding of their positions, ``[T, pairs]`` float32.

    Attributes
    ----------
    under_way
        Whether attention goes through it: what an interrupt left behind leads nowhere.
    """

    def __init__(self, decoder: Decoder, sequence: Joined, cos: Any, sin: Any) -> None:
        self._decoder, self._sequence = decoder, sequence
        self._cos, self._sin = cos, sin
        self.under_way = False

    @property
    def beyond(self) -> bool:
        """Whether a key or value was too large for the cache."""
        return self._sequence.kv.beyond

    def attend(self, index: int, attention: Any, hidden: Tensor) -> Tensor:
        """Return what a layer's attention makes of ``hidden`` ``[1, T, D]``."""
        q, k, v = (
            project(hidden).detach().float()[0].contiguous().numpy()
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        kv = self._sequence.kv
        out = self._decoder.attend(index, q, k, v, self._cos, self._sin, kv)
        self._sequence.advance_layer(index, hidden.shape[1])
        result: Tensor = attention.o_proj(torch.from_numpy(out)[None].to(hidden.dtype))
        return result


def in_pieces(ids: Tensor, keep: int | Tensor) -> Iterator[tuple[slice, int | Tensor]]:
    """Cut a prompt ``[1, T]``; yields each piece's place and the logits that it has to keep.

    ``keep`` is transformers' ``logits_to_keep``: so many at the end, 0 for all, or places.
    """
    total = ids.shape[1]
    if not isinstance(keep, int):
        yield slice(0, total), keep
        return
    first_kept = total - keep if keep else 0
    for start in range(0, total, PIECE):
        stop = min(start + PIECE, total)
        yield slice(start, stop), max(1, stop - max(start, first_kept))


@contextmanager
def attention_in_pieces(layers: Any, piece: Piece) -> Iterator[None]:
    """Let the attention of a model's layers go through ``piece``, for calls of this thread."""
    modules = [layer.self_attn for layer in layers]
    try:
        for index, attention in enumerate(modules):
            restore_forward(attention)
            redirect_forward(attention, _redirected(attention, index, piece))
        piece.under_way = True
        yield
    finally:
        piece.under_way = False  # before anything that an interrupt can come between
        for attention in modules:
            restore_forward(attention)


def _redirected(attention: Any, index: int, piece: Piece) -> Callable[..., Any]:
    plain, thread = attention.forward, threading.get_ident()

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not piece.under_way or threading.get_ident() != thread:
            return plain(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return piece.attend(index, attention, hidden), None

    return forward


@contextmanager
def prompts_told(model: Any, report: OnPrompt) -> Iterator[None]:
    """Call ``report`` after every piece of a prompt that ``model`` computes meanwhile.

    A prompt that the fast path does not compute is computed in one go and reports nothing. An
    exception that ``report`` raises ends the prompt.
    """
    path = fast_path_of(model)
    if path is None:
        yield
        return
    before, path.on_prompt = path.on_prompt, report
    try:
        yield
    finally:
        path.on_prompt = before


@contextmanager
def prompt_bar(model: Any, console: Console | None = None) -> Iterator[None]:
    """Show a bar on stderr while ``model`` computes a long prompt: tokens, rate, time left.

    It goes away when the prompt is done, before the first token is written.
    """
    bar = Progress(
        TextColumn("reading the prompt"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True) if console is None else console,
        transient=True,
    )
    task: list[Any] = []

    def report(at: PromptProgress) -> None:
        if at.total < _LONG:
            return
        if not task:
            bar.start()
            task.append(bar.add_task("", total=at.total, rate=""))
        bar.update(task[0], completed=at.done, rate=f"{at.tokens_per_s:.0f} tokens/s")
        if at.done == at.total:
            bar.stop()
            bar.remove_task(task.pop())

    try:
        with prompts_told(model, report):
            yield
    finally:
        if task:  # stopping a bar that never began would write an empty line
            bar.stop()


class Teller:
    """Reports one prompt's progress to whoever wants to know."""

    def __init__(self, report: OnPrompt | None, total: int) -> None:
        self._report, self._total = report, total
        self._start_s = time.perf_counter()

    def tell(self, done: int) -> None:
        """Report that ``done`` tokens are computed."""
        if self._report is not None:
            elapsed_s = time.perf_counter() - self._start_s
            self._report(PromptProgress(done, self._total, elapsed_s))
