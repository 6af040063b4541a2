"""Tells the executor what the dense parts of the present step are predicted to take."""

from __future__ import annotations

from planner.cost.cost import CostModel
from planner.cost.step_times import dense_times


class DenseSeconds:
    """Predicted seconds of what is not a routed expert, by MoE layer, assembled once a step.

    Dense decoder layers count for the MoE layer that follows them, or else for the head:
    :meth:`planner.cost.step_times.StepTimes.as_timed`.
    """

    def __init__(self, cost: CostModel, context: int) -> None:
        self._cost = cost
        self._moe = [layer.moe for layer in cost.model.layers]
        self._step = (context, 1)
        self._tokens = 0
        self._mixers_s: list[float] = []
        self._shared_s: list[float] = []
        self._head_s = 0.0

    def at(self, context: int, sequences: int = 1) -> None:
        """Take it that so many ``sequences`` are ``context`` tokens long after the next step."""
        self._step = (context, sequences)
        self._tokens = 0

    def mixer(self, layer: int, tokens: int) -> float:
        """From the layer before to the router's answer."""
        if tokens != self._tokens:
            self._assemble(tokens)
        return self._mixers_s[layer]

    def shared(self, layer: int, tokens: int) -> float:
        """The shared expert."""
        if tokens != self._tokens:
            self._assemble(tokens)
        return self._shared_s[layer]

    def head(self, tokens: int) -> float:
        """What follows the last MoE layer, in a step of so many tokens."""
        if tokens != self._tokens:
            self._assemble(tokens)
        return self._head_s

    def _assemble(self, tokens: int) -> None:
        context, sequences = self._step
        dense = dense_times(self._cost, tokens, max(tokens // sequences, context), sequences)
        self._mixers_s, self._shared_s, waiting_s = [], [], 0.0
        for (mixer_s, ffn_s), moe in zip(dense.layers, self._moe, strict=True):
            if moe:
                self._mixers_s.append(waiting_s + mixer_s)
                self._shared_s.append(ffn_s)
                waiting_s = 0.0
            else:
                waiting_s += mixer_s + ffn_s
        self._head_s = dense.head_s + waiting_s
        self._tokens = tokens
