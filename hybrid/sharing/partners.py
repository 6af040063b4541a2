"""The protocols that the executor calls: predictions, and shared experts started early."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybrid.sharing.routed import F32

Ahead = list[tuple[int, NDArray[np.float64]]]


class Seconds(Protocol):
    """What a layer's dense parts are predicted to take."""

    def mixer(self, layer: int, tokens: int) -> float:
        """From the layer before to the router's answer."""

    def shared(self, layer: int, tokens: int) -> float:
        """The shared expert."""

    def at(self, context: int, sequences: int = 1) -> None:
        """Take it that so many ``sequences`` are ``context`` tokens long after the next step."""


class Predictor(Protocol):
    """What tells the next layers' experts: :mod:`hybrid.sharing.predictor`, or a replay."""

    def limit(self, layers: int) -> None:
        """Look no more than so many layers ahead from now on."""

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What is to be known of ``hidden``, on its device; None when nothing is predicted."""

    def probabilities(self, layer: int, scores: F32) -> Ahead:
        """The chance of each expert of the next layers to be activated, for one token."""

    def expected_loads(self, layer: int, scores: F32) -> Ahead:
        """The tokens that each expert of the next layers will get, for several."""

    def learn(self, layer: int, ids: NDArray[np.integer]) -> None:
        """What the layer's router chose."""


class Launcher(Protocol):
    """What starts shared experts early: :class:`hybrid.sharing.shared_first.SharedFirst`."""

    def launch(self, layer: int, hidden: Tensor) -> object:
        """Start the layer's shared expert."""

    def abandon(self) -> None:
        """Forget what was started."""
