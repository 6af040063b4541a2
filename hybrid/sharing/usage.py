"""Counts which experts a running model uses, and records them token by token if asked to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybrid.errors import UsageError, first_line
from hybrid.formats.notes import Note
from hybrid.sharing.routed import F32, Ids, RoutedTokens
from hybrid.sharing.trace import TraceRecorder


class Usage:
    """Counts since the model was loaded.

    Parameters
    ----------
    layers, experts
        L and E of the model.
    record
        Whether to keep every token's choice, too.

    Attributes
    ----------
    uses, tokens
        How often each expert was used, ``[L, E]``, by how many tokens.
    recorder
        Keeps the choices; None when nobody asked, or once they no longer fit a trace.
    """

    def __init__(self, layers: int, experts: int, record: bool) -> None:
        self.uses: NDArray[np.int64] = np.zeros((layers, experts), np.int64)
        self.tokens = 0
        self.recorder = TraceRecorder(layers) if record else None

    def forget(self) -> None:
        """Begin anew: a warm-up is nobody's session."""
        self.uses[:] = 0
        self.tokens = 0
        if self.recorder is not None:
            self.recorder = TraceRecorder(len(self.uses))

    def count(self, layer: int, tokens: int, loads: tuple[tuple[int, int], ...]) -> None:
        """Add a layer's ``(expert, tokens)`` pairs."""
        if layer == 0:
            self.tokens += tokens
        for expert, load in loads:
            self.uses[layer, expert] += load

    def record(self, layer: int, ids: Ids, factors: F32) -> Note | None:
        """Keep what the router chose, if somebody wants to know.

        Returns a note when the choice fits no trace, which ends the recording.
        """
        if self.recorder is None:
            return None
        try:
            self.recorder.learn(layer, ids, factors)
        except UsageError as error:
            self.recorder = None
            reason, remedy = first_line(error), "leave --routing out"
            return Note("routing is recorded no more", reason, remedy)
        return None

    def of_cpu(self, layer: int, expert_ids: Tensor, weights: Tensor) -> Note | None:
        """Count and record a layer that is computed without a device."""
        ids, factors = expert_ids.detach().cpu().numpy(), weights.detach().float().cpu().numpy()
        self.count(layer, len(ids), RoutedTokens(ids, factors, self.uses.shape[1]).loads)
        return self.record(layer, ids, factors)
