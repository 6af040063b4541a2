"""Gated delta nets as they are defined: a memory for every head, one token after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpu_experts.decoder.delta_layer import Delta

F64 = NDArray[np.float64]


def delta_net(delta: Delta, products: F64, inputs: F64, memory: F64) -> tuple[F64, F64, F64]:
    """What tokens of one text read of a gated delta net's memory (equation 10 of 2412.06464).

    ``products`` ``[T, rows]`` are the layer's first products. Returns ``[T, H * value_dim]``, the
    inputs ``[taps, channels]`` and memory ``[H, key_dim, value_dim]`` behind the last token.
    """
    shared, key, value = delta.value_heads // delta.key_heads, delta.key_dim, delta.value_dim
    at, found = delta.places, []
    for row in products:
        sides: dict[str, list] = {name: [] for name in "qkvzba"}
        for head in range(delta.key_heads):
            for name, size in zip("qkvz", (key, key, shared * value, shared * value), strict=True):
                begin = getattr(at, name) + head * getattr(at, f"{name}_step")
                sides[name].extend(row[begin : begin + size])
            for name in "ba":
                begin = getattr(at, name) + head * at.a_step
                sides[name].extend(row[begin : begin + shared])
        inputs = np.concatenate((inputs[1:], [sides["q"] + sides["k"] + sides["v"]]))
        mixed = (inputs * delta.conv).sum(0) + (0 if delta.bias is None else delta.bias)
        mixed = mixed / (1 + np.exp(-mixed))
        keys = delta.key_heads * key
        q, k = (part.reshape(-1, key) for part in (mixed[:keys], mixed[keys : 2 * keys]))
        v = mixed[2 * keys :].reshape(-1, value)
        memory, outs = memory.copy(), []
        for head in range(delta.value_heads):
            query, name = q[head // shared], k[head // shared]
            query = query / np.sqrt((query**2).sum() + 1e-6) / np.sqrt(key)
            name = name / np.sqrt((name**2).sum() + 1e-6)
            step = np.log1p(np.exp(sides["a"][head] + delta.steps[head]))
            kept = np.exp(delta.forgets[head] * step) * memory[head]
            take = 1 / (1 + np.exp(-sides["b"][head]))
            memory[head] = kept + np.outer(name, take * (v[head] - name @ kept))
            out = query @ memory[head]
            out = out / np.sqrt((out**2).mean() + delta.norm.eps) * delta.norm.weight
            gate = np.array(sides["z"][head * value : (head + 1) * value])
            outs.append(out * gate / (1 + np.exp(-gate)))
        found.append(np.concatenate(outs))
    return np.array(found), inputs, memory
