"""Writes many texts at once: one round after the other, some tokens of each.

In a round every text that waits for its next token gets it, in one step of all of them; beside them
a prompt goes on by a piece. How long the others may be held up by it, :data:`HOLD_S`, says how many
tokens a piece has; prompts take turns. Memory that texts have no room in is taken from what
:class:`~hybrid.engine.prefixes.Prefixes` remembers, and then from the text that came last, which is
set aside and goes on, from its tokens, when another has ended. So the first text always gets on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpu_experts.decoder.pages import PAGE, PagesFull
from hybrid.engine.errors import BeyondHalfError, NotANumberError, TooLongError
from hybrid.engine.kept_prefixes import KeptPrefixes
from hybrid.engine.prefixes import Prefixes
from hybrid.engine.running import OnEnd, Running
from hybrid.fast.decode import STEP, FastDecoder
from hybrid.fast.many import ManySequences
from hybrid.fast.prompt import PIECE
from hybrid.formats.strips import TILE
from hybrid.grafts import fast_path_of
from hybrid.ledger.alone import begin_run
from hybrid.session.generation_stream import Stopped
from hybrid.session.model import HybridModel
from hybrid.session.writing import Writing

HOLD_S = 0.25
"""Seconds that a piece of a prompt may hold up the tokens of others, about; a piece has 32 tokens
at least."""

_Share = tuple[Running, int]
"""A text, and how many of its pending tokens."""

_NEW = 0.3
"""Weight of the last piece's rate in what is known of rates."""


class Together:
    """Texts of one model that are written at once, on the CPU alone.

    All of its methods are for one thread.

    Parameters
    ----------
    model
        The model.
    parallel
        Texts at once, at most.
    cache_bytes
        Memory for the keys and values of all of them, and of what is remembered.

    Attributes
    ----------
    parallel
        See above.
    running
        The texts, in the order in which they came.
    refused
        Why texts are written one at a time; None where they are written together.
    """

    def __init__(self, model: HybridModel, parallel: int, cache_bytes: int) -> None:
        self.parallel = parallel
        self.running: list[Running] = []
        self.refused: str | None = None
        self._model, self._cache_bytes = model, cache_bytes
        self._memory: _Memory | None = None
        self._turn = 0
        self._tokens_per_s = 0.0
        with model.turn(), torch.no_grad():
            self._ready()

    @property
    def room(self) -> int:
        """Tokens whose keys and values fit into the memory."""
        return 0 if self._memory is None else self._memory.room

    @property
    def remembered(self) -> int:
        """Tokens whose keys and values are remembered, those of running texts among them."""
        return 0 if self._memory is None else self._memory.prefixes.tokens

    def check_fits(self, tokens: int) -> None:
        """Raise TooLongError when the memory has no room for a prompt of so many tokens."""
        if self._memory is not None and tokens >= self.room:
            raise TooLongError(tokens, self.room)

    def admit(
        self, writing: Writing, seed: int | None, check: Callable[[], None], on_end: OnEnd
    ) -> bool:
        """Begin a text; returns False for one that has to be written alone.

        Parameters
        ----------
        writing
            The text.
        seed
            Of its random numbers; others each time unless given.
        check, on_end
            See :class:`~hybrid.engine.running.Running`.

        Raises
        ------
        TooLongError
            When its prompt does not fit into the memory.
        UsageError
            As :meth:`HybridModel.write` does.
        """
        assert len(self.running) < self.parallel
        with self._model.turn(), torch.no_grad():
            if not self._ready() or self._memory is None:
                return False
            self.check_fits(writing.ids.shape[1])
            many = self._memory.many
            prepared, drafts = self._model.prepare(writing)
            begin_run(self._model.loaded, 0)
        if prepared is None:
            return False
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        text = Running(prepared, writing.stream, check, generator, many.vocabulary, on_end, drafts)
        text.follow(self.running)
        self.running.append(text)
        return True

    def round(self) -> None:
        """Compute some tokens of every text, and end those that are complete or left."""
        for text in list(self.running):
            self._guarded(text, text.check)
        if not self.running:
            return
        with self._model.turn(), torch.no_grad():
            step, piece = self._shares()
            if step and len(self.running) == 1:
                self._compute(step, self._single)
            elif step:
                self._compute(step, self._step)
            if piece:
                self._compute(piece, self._piece)

    def load(self, kept: KeptPrefixes) -> str:
        """Read what is kept of texts, before any is written; returns what came of it, in words."""
        assert self._memory is not None
        return kept.load(self._memory.many.pages, self._memory.prefixes)

    def save(self, kept: KeptPrefixes) -> str:
        """Keep what is remembered of texts, once none is written any more; says what came of it."""
        assert self._memory is not None
        return kept.save(self._memory.many.pages, self._memory.prefixes)

    def check_integrity(self) -> None:
        """Assert that all memory is that of running texts, remembered or free."""
        if self._memory is not None:
            self._memory.many.pages.check_integrity(self._memory.prefixes.held())

    def _ready(self) -> bool:
        """Whether texts can be begun now; makes the memory where there is none for the decoder."""
        network = self._model.model
        path, fast = fast_path_of(network), None
        if self._model.placement is not None:
            self.refused = f"the model lies on {self._model.placement.device}"
        elif path is None:
            self.refused = "the model has no fast path"
        else:
            fast, self.refused = path.ready(network)
        if fast is not None:
            self.refused = ManySequences.unfit(fast)
        if fast is None or self.refused is not None:
            return False
        if self._memory is None or self._memory.fast is not fast:
            for text in self.running:  # of weights that are others by now
                text.sequence = None
            pages = fast.decoder.new_pages(self._cache_bytes, self.parallel)
            self._memory = _Memory(fast, ManySequences(network, fast, pages), Prefixes(pages))
            pages.reclaim = self._memory.prefixes.reclaim
        return True

    def _shares(self) -> tuple[list[_Share], list[_Share]]:
        """Return what texts get of this round: some a step together, one a piece of its prompt."""
        if all(text.aside for text in self.running):
            self.running[0].aside = False
        for text in [text for text in self.running if not (text.aside or text.waits())]:
            self._open(text)
        there = [text for text in self.running if text.sequence is not None]
        step = [(text, 1) for text in there if text.missing == 1]
        prompts = [text for text in there if text.missing > 1]
        most = self._piece_tokens() if step else PIECE
        left, piece = STEP - len(step), list[_Share]()
        self._turn += 1
        for at in range(len(prompts)):
            text = prompts[(self._turn + at) % len(prompts)]
            count = min(text.missing, most)
            if count > left:
                piece = [(text, count)]
                break
            step.append((text, count))
            left -= count
        for text, count in sorted(step + piece, key=lambda share: self.running.index(share[0])):
            self._make_room(text, count)
        return (
            [share for share in step if share[0].sequence is not None],
            [share for share in piece if share[0].sequence is not None],
        )

    def _piece_tokens(self) -> int:
        """Return how many tokens of a prompt take as long as others may be held up."""
        if not self._tokens_per_s:
            return 4 * STEP
        return max(STEP, min(PIECE, int(self._tokens_per_s * HOLD_S) // TILE * TILE))

    def _open(self, text: Running) -> None:
        """Give a text a sequence, if it has none, that begins with what is known of it."""
        if text.sequence is None:
            assert self._memory is not None
            known = self._memory.prefixes.longest(text.ids[:-1])  # the last one's logits are wanted
            text.sequence = self._memory.many.pages.open(known.pages, known.tokens)
            self._guarded(text, lambda: text.begin(known.tokens))

    def _make_room(self, text: Running, count: int) -> None:
        """Make room for so many tokens of a text, if need be by setting the last ones aside."""
        while text.sequence is not None:
            try:
                return text.sequence.make_room(count)
            except PagesFull:
                last = [each for each in self.running if each.sequence is not None][-1]
                self._keep(last)
                last.aside = True

    def _compute(self, shares: list[_Share], compute: Callable[[list[_Share]], None]) -> None:
        """Compute the shares of some texts; an error ends them, and no others."""
        try:
            compute(shares)
        except Exception as error:
            for text, _ in shares:
                if text in self.running:
                    self._end(text, error)

    def _step(self, shares: list[_Share]) -> None:
        assert self._memory is not None
        given = [
            (text.sequence, text.pending(count))
            for text, count in shares
            if text.sequence is not None
        ]
        rows = self._memory.many.step(given)
        for (text, _), row in zip(shares, rows, strict=True):
            self._guarded(text, functools.partial(self._advance, text, row[None]))

    def _single(self, shares: list[_Share]) -> None:
        """Compute what one text gets alone; where its next token is due, with a draft of more."""
        ((text, count),) = shares
        assert self._memory is not None
        assert text.sequence is not None
        due = text.missing == 1
        draft = text.draft(self.room) if due else []
        try:
            text.sequence.make_room(count + len(draft))
        except PagesFull:
            draft = []
        begun_s = time.perf_counter()
        rows = self._memory.many.step_one(text.sequence, [*text.pending(count), *draft])
        seconds = time.perf_counter() - begun_s

        def advance() -> None:
            new = self._advance(text, rows[-1 - len(draft) :], draft)
            if text.drafts is not None and due:
                text.drafts.took(1 + len(draft), new, seconds)

        self._guarded(text, advance)

    def _piece(self, shares: list[_Share]) -> None:
        assert self._memory is not None
        ((text, count),) = shares
        assert text.sequence is not None
        begun_s = time.perf_counter()
        row = self._memory.many.prompt(text.sequence, text.pending(count))
        rate = count / (time.perf_counter() - begun_s)
        known = self._tokens_per_s or rate
        self._tokens_per_s = known + _NEW * (rate - known)
        self._guarded(text, lambda: self._advance(text, row[None]))

    def _advance(self, text: Running, rows: Tensor, draft: Sequence[int] = ()) -> int:
        """Take what was computed of a text; returns how many new tokens that has.

        ``rows`` ``[T, V]`` are the logits after its last pending token and those of a draft.
        """
        assert self._memory is not None
        assert text.sequence is not None
        length = text.sequence.length() - len(draft)
        if text.sequence.beyond:
            raise BeyondHalfError(length)
        if bool(np.isnan(rows[0].float().numpy().max())):
            raise NotANumberError(length)
        if not text.new_tokens:
            whole = length // PAGE
            self._memory.prefixes.add(text.ids[: whole * PAGE], text.sequence.pages[:whole])
        if length < len(text.ids):
            return 0
        new, ended = text.accept(rows, draft)
        if ended:
            self._end(text, None)
        return new

    def _guarded(self, text: Running, call: Callable[[], object]) -> None:
        """Call what concerns one text alone, and end that where it raises."""
        try:
            call()
        except Stopped:
            self._end(text, None)
        except Exception as error:
            self._end(text, error)

    def _keep(self, text: Running) -> None:
        """Remember a text's keys and values, and take its sequence away."""
        if text.sequence is not None and self._memory is not None:
            length = text.sequence.length()
            pages = text.sequence.pages[: -(-length // PAGE)]
            self._memory.prefixes.add(text.ids[:length], pages)
            text.sequence.close()
            text.sequence = None

    def _end(self, text: Running, error: Exception | None) -> None:
        """Write a text no further; others that were set aside may go on."""
        self.running.remove(text)
        text.ended = True
        if error is None:
            self._keep(text)
        elif text.sequence is not None:
            text.sequence.close()
            text.sequence = None
        for other in self.running:
            other.aside = False
        text.on_end(error)


class _Memory(NamedTuple):
    """Where keys and values of a decoder lie, and what is known of them."""

    fast: FastDecoder
    many: ManySequences
    prefixes: Prefixes

    @property
    def room(self) -> int:
        """Tokens of the longest text; a page more is needed where others hold its last one."""
        return (self.many.pages.count - 1) * PAGE
