"""What a model's dense parts are predicted to take, as the executor asks for it."""

from __future__ import annotations

from planner.cost.cost import CostModel

CONTEXT_STEP = 64
"""Contexts that differ by less are predicted alike."""


class DenseSeconds:
    """Predicted seconds of what is not a routed expert, by MoE layer.

    Dense decoder layers count for the MoE layer that follows them.
    """

    def __init__(self, cost: CostModel, context: int) -> None:
        self._cost, self._context = cost, context
        self._groups: list[list[int]] = []
        group: list[int] = []
        for index, layer in enumerate(cost.model.layers):
            group.append(index)
            if layer.moe:
                self._groups.append(group)
                group = []
        self._after = group
        self._known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def at(self, context: int) -> None:
        """Take it that sequences are ``context`` tokens long from now on, give or take a step."""
        self._context = -(-context // CONTEXT_STEP) * CONTEXT_STEP

    def mixer(self, layer: int, tokens: int) -> float:
        """From the layer before to the router's answer."""
        return self._both(layer, tokens)[0]

    def shared(self, layer: int, tokens: int) -> float:
        """The shared expert."""
        return self._both(layer, tokens)[1]

    def deciding(self, tokens: int, copies: int = 0) -> float:
        """From a router's answer until the device has its work, so many copies among it."""
        return self._cost.deciding(tokens, copies).value

    def joining(self, tokens: int) -> float:
        """A layer's experts beyond their plan, until their sum is there."""
        return self._cost.joining(tokens).value

    def head(self, tokens: int) -> float:
        """What follows the last MoE layer, in a step of so many tokens."""
        return self._cost.head(1, tokens).value + sum(self._dense(i, tokens) for i in self._after)

    def _both(self, layer: int, tokens: int) -> tuple[float, float]:
        found = self._known.get((layer, tokens, self._context))
        if found is None:
            *before, index = self._groups[layer]
            own = self._cost.model.layers[index]
            mixer_s = self._cost.mixer(own, tokens, self._seen(tokens)).value
            mixer_s += sum(self._dense(i, tokens) for i in before)
            found = mixer_s, self._cost.ffn(own, tokens).value
            self._known[layer, tokens, self._context] = found
        return found

    def _seen(self, tokens: int) -> int:
        """Context of a step; a prompt that is all of it, give or take a step, is just that."""
        whole = tokens > 1 and self._context - tokens < CONTEXT_STEP
        return tokens if whole else max(tokens, self._context)

    def _dense(self, index: int, tokens: int) -> float:
        layer = self._cost.model.layers[index]
        mixer = self._cost.mixer(layer, tokens, self._seen(tokens))
        return mixer.value + self._cost.ffn(layer, tokens).value
