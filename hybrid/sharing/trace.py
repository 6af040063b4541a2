"""Recording which experts a running model chooses, as a trace that the planner reads.

A trace is an ``.npz`` with ``expert_ids`` ``[T, L, A]``, ``routing_weights`` (float16) of the same
shape and ``sequence_offsets`` ``[S + 1]``: sequence s is tokens ``offsets[s]:offsets[s + 1]``.
``hybrid plan --trace`` replays it, and caches can start with what it used most.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UsageError
from hybrid.weights.partial import sync

#: Tokens kept unless told otherwise: some 100 MB of a model of 48 layers with 8 active experts.
LIMIT = 100_000


class TraceRecorder:
    """Keeps what the routers choose, forward by forward.

    A forward counts once its last layer is there: one that was cancelled leaves nothing. The rows
    of a batch count as tokens one after another.

    Parameters
    ----------
    layers
        L, the layers with experts.
    limit
        Tokens after which no more are kept.

    Attributes
    ----------
    tokens
        Tokens kept.
    left_out
        Tokens that came after the limit.
    """

    def __init__(self, layers: int, *, limit: int = LIMIT) -> None:
        self.tokens = self.left_out = 0
        self._layers, self._limit = layers, limit
        self._ids: list[NDArray[np.int32]] = []
        self._weights: list[NDArray[np.float16]] = []
        self._offsets = [0]
        self._forward: list[tuple[NDArray[np.int32], NDArray[np.float16]]] = []

    def learn(
        self, layer: int, ids: NDArray[np.integer[Any]], weights: NDArray[np.floating[Any]]
    ) -> None:
        """Take what the router of ``layer`` chose for T tokens.

        Parameters
        ----------
        layer
            Index among the layers with experts; they come in order, from 0.
        ids, weights
            ``[T, A]``, copied.

        Raises
        ------
        UsageError
            When the shapes differ from each other's or from those of the layers before.
        """
        if layer == 0:
            self._forward = []
        if layer != len(self._forward):  # the forward's beginning was not seen
            return
        wanted = self._forward[0][0].shape if self._forward else weights.shape
        if not ids.shape == weights.shape == wanted or ids.ndim != 2:
            raise UsageError(
                f"layer {layer} chose ids {list(ids.shape)} with weights {list(weights.shape)}, "
                f"{list(wanted)} are expected",
                hint="a trace has as many experts for every token and layer",
            )
        self._forward.append((ids.astype(np.int32), weights.astype(np.float16)))
        if len(self._forward) == self._layers:
            self._keep()

    def end_sequence(self) -> None:
        """Begin another sequence with the next token."""
        if self.tokens > self._offsets[-1]:
            self._offsets.append(self.tokens)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the trace: as a whole, or not at all.

        Raises
        ------
        UsageError
            When nothing was recorded, the file exists and ``overwrite`` is not set, or it cannot
            be written.
        """
        if not self.tokens:
            raise UsageError(
                f"there is nothing to write to {path}: 0 tokens were recorded",
                hint="generate something first",
            )
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists", hint="choose another name, or move it away")
        ids = np.concatenate(self._ids)
        offsets = (
            self._offsets if self._offsets[-1] == self.tokens else [*self._offsets, self.tokens]
        )
        unfinished = path.with_name(f"{path.name}.partial")
        try:
            with unfinished.open("wb") as file:
                np.savez_compressed(
                    file,
                    expert_ids=ids.astype(np.min_scalar_type(int(ids.max()))),
                    routing_weights=np.concatenate(self._weights),
                    sequence_offsets=np.array(offsets, np.int32),
                )
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.absolute().parent)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UsageError(
                f"cannot write {path}: {error.strerror or error}",
                hint="check the folder, its permissions and its free space",
            ) from error

    def _keep(self) -> None:
        """Keep the complete forward, as far as there is room."""
        layers, self._forward = self._forward, []
        came = len(layers[0][0])
        kept = min(came, self._limit - self.tokens)
        self.left_out += came - kept
        if kept:
            self._ids.append(np.stack([ids[:kept] for ids, _ in layers], axis=1))
            self._weights.append(np.stack([weights[:kept] for _, weights in layers], axis=1))
            self.tokens += kept
