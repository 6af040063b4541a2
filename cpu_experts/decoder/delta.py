"""Gated delta nets: layers that keep a state instead of keys and values (2412.06464).

A layer's first products hold, for every key head, a query, a key, and the values and gates of the
value heads that share them, besides two numbers a value head: how much its memory forgets, and how
much of the new value it takes. Query, key and value pass a short causal convolution over the last
inputs first. A value head's memory is a matrix ``[key_dim, value_dim]``: what it holds under a key
is read, corrected towards the value, and read again with the query. All of it is float32.

A step reads the state that there was and writes another one beside it, so that what was before
the step is there until it is over.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np

from cpu_experts.jit.addresses import floats_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.micro import fetch_add, silu_strip
from hybrid.formats.strips import TILE

_ZERO = np.int64(0)
#: Beyond this a softplus is its argument, as in torch.
_LINEAR = np.float32(20)
#: Added to the sum of squares of a query or key before its root is taken.
_TINY = np.float32(1e-6)


@kernel()
def _convolve(delta, past, qkv, first, t, source, channel, size, out):
    """Write the activated convolution of ``size`` channels at token ``first + t`` to ``out``.

    ``source`` is where their inputs lie in the rows of ``qkv``, ``channel`` the first of them in
    the convolution. Inputs before the text's ``first`` token are in its ``past``
    ``[taps * channels]``.
    """
    taps, channels = delta["taps"], delta["channels"]
    weights = floats_at(delta["conv"], taps * channels)
    for i in range(size):
        out[i] = 0
    for tap in range(taps):
        at = t - (taps - 1) + tap
        weight = weights[tap * channels + channel :]
        if at >= 0:
            given = qkv[first + at, source : source + size]
            for i in range(size):
                out[i] += weight[i] * given[i]
        else:
            kept = past[(taps + at) * channels + channel :]
            for i in range(size):
                out[i] += weight[i] * kept[i]
    if delta["bias"]:
        bias = floats_at(delta["bias"], channels)[channel:]
        for i in range(size):
            out[i] += bias[i]
    for i in range(_ZERO, size, TILE):
        silu_strip(out, i, np.float32(1), out, i)


@kernel()
def _remember(delta, past, after, qkv, first, tokens, source, channel, size):
    """Keep the last inputs of ``size`` channels for the next step in ``after``."""
    taps, channels = delta["taps"], delta["channels"]
    for tap in range(taps):
        at = tokens - taps + tap
        target = after[tap * channels + channel :]
        if at >= 0:
            given = qkv[first + at, source : source + size]
            for i in range(size):
                target[i] = given[i]
        else:
            kept = past[(taps + at) * channels + channel :]
            for i in range(size):
                target[i] = kept[i]


@kernel(reassociate=True)
def _squares(x, size):
    total = np.float32(0)
    for i in range(size):
        total += x[i] * x[i]
    return total


@kernel()
def _scale(x, size, factor):
    for i in range(size):
        x[i] *= factor


@kernel()
def _correct(before, after, forget, take, query, key, value, key_dim, value_dim, held, out):
    """Move a head's memory on by a token, and read it: ``out[:value_dim]``.

    ``before`` and ``after`` ``[key_dim * value_dim]`` may be the same memory; ``held`` is scratch.
    """
    for j in range(value_dim):
        held[j] = 0
        out[j] = 0
    for i in range(key_dim):
        row, weight = before[i * value_dim :], key[i]
        for j in range(value_dim):
            held[j] += weight * row[j]
    for j in range(value_dim):
        held[j] = take * (value[j] - forget * held[j])
    for i in range(key_dim):
        row, target, weight, asked = (
            before[i * value_dim :],
            after[i * value_dim :],
            key[i],
            query[i],
        )
        for j in range(value_dim):
            now = forget * row[j] + weight * held[j]
            target[j] = now
            out[j] += asked * now


@kernel()
def _read_out(delta, gate, out, buf, target):
    """Write the gated norm of what was read of a memory to ``target``."""
    size = delta["value_dim"]
    weight = floats_at(delta["norm"], size)
    scale = np.float32(1) / np.sqrt(_squares(out, size) / np.float32(size) + delta["eps"])
    for i in range(size):
        buf[i] = gate[i]
    for i in range(_ZERO, size, TILE):
        silu_strip(buf, i, np.float32(1), buf, i)
    for i in range(size):
        target[i] = out[i] * scale * weight[i] * buf[i]


@kernel()
def delta_items(counter, at, delta, states, texts, qkv, buf, found):
    """Take (text, key head) items of a step: their memories, and what is read of them.

    ``qkv`` ``[count, ..]`` are the first products of the tokens of all ``texts``, ``found``
    ``[count, value_heads * value_dim]`` is written, and ``buf`` is scratch. Returns how many items
    there are.
    """
    heads, key_dim, value_dim = delta["key_heads"], delta["key_dim"], delta["value_dim"]
    many, taps = delta["value_heads"] // heads, delta["taps"]
    values, size = many * value_dim, key_dim * value_dim
    kept, whole = taps * delta["channels"], delta["value_heads"] * size
    query, key, value = buf, buf[key_dim:], buf[2 * key_dim :]
    held, out, gate = value[values:], value[values + value_dim :], value[values + 2 * value_dim :]
    small = np.float32(1) / np.sqrt(np.float32(key_dim))
    forgets = floats_at(delta["forgets"], delta["value_heads"])
    steps = floats_at(delta["steps"], delta["value_heads"])
    items = texts.size * heads
    while True:
        item = fetch_add(counter, at)
        if item >= items:
            break
        text, head = texts[item // heads], item % heads
        state, place, first = states[text["row"]], text["place"], text["first"]
        past = floats_at(state["inputs"], (place + 1) * kept)[place * kept :]
        later = floats_at(state["inputs_after"], (place + 1) * kept)[place * kept :]
        memory = place * whole + head * many * size
        before = floats_at(state["memory"], (place + 1) * whole)[memory:]
        after = floats_at(state["memory_after"], (place + 1) * whole)[memory:]
        in_q = delta["q"] + head * delta["q_step"]
        in_k = delta["k"] + head * delta["k_step"]
        in_v = delta["v"] + head * delta["v_step"]
        of_q, of_k = head * key_dim, (heads + head) * key_dim  # in the convolution
        of_v = 2 * heads * key_dim + head * values
        for t in range(text["tokens"]):
            row = qkv[first + t]
            _convolve(delta, past, qkv, first, t, in_q, of_q, key_dim, query)
            _convolve(delta, past, qkv, first, t, in_k, of_k, key_dim, key)
            _convolve(delta, past, qkv, first, t, in_v, of_v, values, value)
            _scale(query, key_dim, small / np.sqrt(_squares(query, key_dim) + _TINY))
            _scale(key, key_dim, np.float32(1) / np.sqrt(_squares(key, key_dim) + _TINY))
            for j in range(many):
                own = head * many + j
                a = row[delta["a"] + head * delta["a_step"] + j] + steps[own]
                if a <= _LINEAR:
                    a = np.log1p(np.exp(a))
                b = row[delta["b"] + head * delta["a_step"] + j]
                _correct(
                    (before if t == 0 else after)[j * size :], after[j * size :],
                    np.exp(forgets[own] * a), np.float32(1) / (np.float32(1) + np.exp(-b)),
                    query, key, value[j * value_dim :], key_dim, value_dim, held, out,
                )  # fmt: skip
                into = found[first + t, own * value_dim : (own + 1) * value_dim]
                z = row[delta["z"] + head * delta["z_step"] + j * value_dim :]
                _read_out(delta, z, out, gate, into)
        tokens = text["tokens"]
        _remember(delta, past, later, qkv, first, tokens, in_q, of_q, key_dim)
        _remember(delta, past, later, qkv, first, tokens, in_k, of_k, key_dim)
        _remember(delta, past, later, qkv, first, tokens, in_v, of_v, values)
        fetch_add(counter, at + 1)
    return items
