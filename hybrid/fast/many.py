"""Steps and prompts of many sequences at once, whose keys and values lie in pages.

A step computes a few tokens of each of some sequences in one compiled call, which reads all weights
once for it. More tokens of a prompt than a step has go through transformers' layers, as
:mod:`hybrid.fast.prompt` does it; over a compressed cache, which those do not share, they are
several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_experts.decoder.pages import PagedSequence, Pages
from hybrid.fast.decode import STEP, FastDecoder
from hybrid.fast.prompt import Piece, attention_in_pieces
from hybrid.grafts import forward_without_fast_path

Given = tuple[PagedSequence, Sequence[int]]
"""A sequence, and the tokens that come next in it."""


class ManySequences:
    """Computes what comes next in sequences of one memory.

    Parameters
    ----------
    network
        A causal language model of transformers.
    fast
        Its decoder.
    pages
        Where the sequences' keys and values lie.

    Attributes
    ----------
    pages
        See above.
    vocabulary
        How many logits there are.
    """

    def __init__(self, network: Any, fast: FastDecoder, pages: Pages) -> None:
        self.pages, self.vocabulary = pages, fast.decoder.vocabulary
        self._fast, self._network = fast, network
        self._dtype = fast.form.dtype
        self._logits = torch.empty(0, self.vocabulary)

    @staticmethod
    def unfit(fast: FastDecoder) -> str | None:
        """Return why a decoder's sequences cannot be computed together; None where they can."""
        if fast.decoder.keeps_states:
            return "its layers keep a state of a text, which does not lie in pages"
        if fast.growing:
            return "how its positions turn depends on how long a text is by now"
        return None

    def step(self, given: Sequence[Given]) -> Tensor:
        """Compute the next tokens of some sequences: one of each, or a few more.

        Returns
        -------
        The logits ``[B, V]`` after each one's last token, in the model's type; valid until the
        next call.

        Raises
        ------
        PagesFull
            When there is no room for them; every sequence is as before then.
        """
        if len(self._logits) < len(given):
            self._logits = torch.empty(len(given), self.vocabulary)
        logits = self._logits[: len(given)]
        counts = np.array([len(ids) for _, ids in given])
        self._compute(given, logits, (np.cumsum(counts) - 1).astype(np.int32))
        return logits.to(self._dtype)

    def _compute(self, given: Sequence[Given], logits: Tensor, kept: NDArray[np.int32]) -> None:
        """Write the ``kept`` tokens' logits; the kernels of one token take a single one."""
        fast, sequences = self._fast, [sequence for sequence, _ in given]
        x = fast.embedded(torch.tensor([token for _, ids in given for token in ids])[None])
        places = [sequence.length() + n for sequence, ids in given for n in range(len(ids))]
        if len(places) == 1:
            cos, sin = fast.rotary(places[0])
            with fast.watch:
                fast.decoder.step(x[0], cos, sin, sequences[0], logits[0].numpy())
            return
        cos, sin = (np.stack(side) for side in zip(*map(fast.rotary, places), strict=True))
        counts = [len(ids) for _, ids in given]
        with fast.step_watch:
            fast.decoder.step_sequences(x, cos, sin, sequences, counts, logits.numpy(), kept=kept)

    def step_one(self, sequence: PagedSequence, ids: Sequence[int]) -> Tensor:
        """Compute the next tokens of one sequence; returns the logits ``[T, V]`` after each.

        Raises
        ------
        PagesFull
            As :meth:`step` does.
        """
        if len(ids) == 1:
            return self.step([(sequence, ids)])
        if len(self._logits) < len(ids):
            self._logits = torch.empty(len(ids), self.vocabulary)
        logits, count = self._logits[: len(ids)], len(ids)
        self._compute([(sequence, ids)], logits, np.arange(count, dtype=np.int32))
        return logits.to(self._dtype)

    def prompt(self, sequence: PagedSequence, ids: Sequence[int]) -> Tensor:
        """Compute a piece of a sequence's prompt; returns the logits ``[V]`` after its last token.

        Raises
        ------
        PagesFull
            When there is no room for it; the sequence is as before then, as it is where an
            interrupt comes.
        """
        before = sequence.length()
        sequence.make_room(len(ids))
        try:
            if len(ids) <= STEP:
                return self.step([(sequence, ids)])[0]
            if not self._fast.attends:
                for first in range(0, len(ids), STEP):
                    logits = self.step([(sequence, ids[first : first + STEP])])[0]
                return logits
            return self._through_layers(sequence, ids, before)
        except BaseException:
            sequence.cut(before)
            raise

    def _through_layers(self, sequence: PagedSequence, ids: Sequence[int], before: int) -> Tensor:
        positions = torch.arange(before, before + len(ids))[None]
        piece = Piece(self._fast.decoder, _Layers(sequence), *self._fast.angles_at(positions))
        forward = forward_without_fast_path(self._network)
        with attention_in_pieces(self._fast.layers, piece):
            output = forward(
                input_ids=torch.tensor([list(ids)]),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[0, -1]
        return logits


class _Layers:
    """A sequence as :class:`Piece` takes it: the kernels count its positions themselves."""

    def __init__(self, sequence: PagedSequence) -> None:
        self.kv = sequence

    def advance_layer(self, index: int, count: int) -> None:
        """Nobody else counts them."""
