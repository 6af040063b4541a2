"""A cache policy that learns, while it runs, which experts will be needed next.

Experts come in company: those chosen now tell which will be chosen in the next tokens, and no
score of an expert's own past can see that. The policy regresses, in each layer, every expert's
discounted future use

    y_t = (1 - GAMMA) * sum_{k >= 1} GAMMA^(k - 1) * used_{t + k},        [E]

on what the router chose up to now: for each of ``TRACES`` a moving average over the steps, either
of the routing weights (rate 1 is the current step alone) or of the uses, all experts side by side,

    minimise over W   sum_t |y_t - x_t W|^2 + RIDGE * |W - W_0|^2,        x_t [4E + 1],

where W_0 predicts from the slowest average, so that a cold start behaves like a frequency count.
The normal equations are accumulated every ``BLOCK`` steps and, whenever they have grown by
``GROWTH``, W is improved by ``SWEEPS`` block Gauss-Seidel sweeps from where it was; layers take
turns, so no token pays for more than one or two of them. All products are done in tiles: matrix
libraries start threads for larger ones, and those would fight with the experts for the cores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.decide.policy import Ids, Policy, Values

TRACES = (("weights", 1.0), ("weights", 0.3), ("uses", 0.1), ("uses", 0.01))
GAMMA = 0.8
HORIZON = 32
"""Steps after which the rest of y is neglected: GAMMA^32 is below 0.001."""
BLOCK = 256
RIDGE = 10.0
FORGET = 0.99
"""Weight of the past per block: the last 25,000 steps or so count."""
GROWTH = 0.125
SWEEPS = 3
TILE = 64


class Forecast(Policy):
    """Keep what a linear model, fitted as the model runs, expects to be used soonest.

    Holds ``(4E + 1)^2`` doubles for each layer: 0.5 MB at 64 experts, 2.1 MB at 128.
    """

    name = "forecast"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        size = len(TRACES) * experts + 1
        rows = BLOCK + HORIZON
        # The last column is the constant 1.
        self._features = np.zeros((layers, size), dtype=np.float32)
        self._features[:, -1] = 1.0
        self._slowest = np.zeros((size, experts), dtype=np.float32)
        self._slowest[size - 1 - experts : size - 1] = np.eye(experts)
        self._model = np.repeat(self._slowest[None], layers, axis=0)
        self._value = np.zeros((layers, experts))
        # What happened since the last block, and the HORIZON steps before it.
        self._past = np.zeros((layers, rows, size), dtype=np.float32)
        self._used = np.zeros((layers, rows, experts), dtype=np.float32)
        # Layers start at different rows of their first block, so that they take turns.
        self._start = HORIZON + np.arange(layers) * BLOCK // layers
        self._row = self._start.copy()
        self._gram = np.zeros((layers, size, size))
        self._cross = np.zeros((layers, size, experts))
        self._seen = np.zeros(layers)
        self._solved_at = np.zeros(layers)
        ahead = np.arange(rows)[None, :] - np.arange(BLOCK)[:, None]
        self._kernel = np.where(ahead > 0, (1 - GAMMA) * GAMMA ** (ahead - 1.0), 0.0).astype(
            np.float32
        )

    def observe(self, layers: Ids, ids: Ids, weights: Values, tokens: int = 1) -> None:
        mean = weights.mean(axis=1, keepdims=True)
        relative = np.divide(weights, mean, out=np.ones(weights.shape), where=mean > 0)
        at, row = layers[:, None], self._row[layers]
        for k, (kind, rate) in enumerate(TRACES):
            columns = slice(k * self.experts, (k + 1) * self.experts)
            self._features[layers, columns] *= np.float32(1 - rate)
            self._features[at, ids + k * self.experts] += (
                rate * relative if kind == "weights" else rate
            )
        features = self._features[layers]
        self._past[layers, row] = features
        self._used[layers, row] = 0.0
        self._used[at, row[:, None], ids] = 1.0
        self._row[layers] += 1
        self._value[layers] = (features[:, None] @ self._model[layers])[:, 0]
        for layer in layers[row + 1 == BLOCK + HORIZON].tolist():
            self._learn(layer)

    def inform(self, uses: Values, tokens: int) -> None:
        """Begin with the slowest average, from which a cold start predicts, as it was."""
        self._features[:, -1 - self.experts : -1] = uses / tokens
        self._value[:] = (self._features[:, None] @ self._model)[:, 0]

    def value(self, layers: Ids) -> Values:
        value: Values = self._value[layers]
        return value

    def _learn(self, layer: int) -> None:
        """Take in the steps whose future is known by now, and keep the others."""
        first = self._start[layer]
        past, used = self._past[layer], self._used[layer]
        x = past[first:BLOCK].astype(np.float64)
        y = _product(self._kernel[first:], used)
        self._gram[layer] = FORGET * self._gram[layer] + _product(x.T, x)
        self._cross[layer] = FORGET * self._cross[layer] + _product(x.T, y)
        self._seen[layer] = FORGET * self._seen[layer] + len(x)
        past[:HORIZON], used[:HORIZON] = past[BLOCK:], used[BLOCK:]
        self._start[layer], self._row[layer] = 0, HORIZON
        self._solved_at[layer] *= FORGET
        if self._seen[layer] >= (1 + GROWTH) * self._solved_at[layer]:
            self._improve(layer)
            self._solved_at[layer] = self._seen[layer]

    def _improve(self, layer: int) -> None:
        """Sweep over blocks of W's rows, solving for each with the others fixed."""
        left = self._gram[layer] + RIDGE * np.eye(len(self._gram[layer]))
        right = self._cross[layer] + RIDGE * self._slowest
        model = self._model[layer].astype(np.float64)
        for _ in range(SWEEPS):
            for start in range(0, len(left), TILE):
                block = slice(start, start + TILE)
                error = right[block] - _product(left[block], model)
                model[block] += np.linalg.solve(left[block, block], error)
        self._model[layer] = model


def _product(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ``a @ b``, one tile at a time."""
    out = np.zeros((a.shape[0], b.shape[1]))
    for i in range(0, a.shape[0], TILE):
        for j in range(0, b.shape[1], TILE):
            for k in range(0, a.shape[1], TILE):
                out[i : i + TILE, j : j + TILE] += (
                    a[i : i + TILE, k : k + TILE] @ b[k : k + TILE, j : j + TILE]
                )
    return out
