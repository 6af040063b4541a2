"""Attention over a compressed cache (MLA, 2405.04434): one latent vector and one key a position.

A position keeps ``[rope + rank]`` numbers: a key that the rotary embedding has turned, and the
latent that all heads' keys and values are products of. Queries are multiplied with the keys'
half of that product once (it is absorbed), so that attention itself is of many heads over one
key, which is its own value; what it sums up goes through the values' half.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np

from cpu_experts.decoder.attention import keep
from cpu_experts.decoder.ops import activate, multiply_strips, normalize, rotate
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.micro import fetch_add
from hybrid.formats.strips import TILE

_ZERO = np.int64(0)


@kernel()
def turned(latent, source, cos, sin, paired, out):
    """Write the turned ``source`` to ``out``; ``apart`` moves neighbours half a head apart."""
    half = cos.size
    if latent["apart"]:
        for i in range(half):
            left, right = source[2 * i], source[2 * i + 1]
            out[i] = left * cos[i] - right * sin[i]
            out[half + i] = right * cos[i] + left * sin[i]
        return
    for i in range(2 * half):
        out[i] = source[i]
    rotate(out, cos, sin, paired)


@kernel()
def _append(layer, state, compressed, cos, sin, paired, key):
    """Write a token's ``compressed`` ``[rank + rope]`` into the cache."""
    latent = layer["latent"]
    turned(latent, compressed[latent["rank"] :], cos, sin, paired, key)
    normalize(latent["kv_norm"], compressed, key[latent["rope"] :])
    no_clip = np.float32(np.inf)
    keep(state, _ZERO, state["length"], layer["head_dim"], key, key, no_clip)


@kernel()
def query_items(
    counter, at, layer, state, queries, compressed, cos, sin, paired, normed, memory, rows, buf,
    key, wide,
):  # fmt: skip
    """Take heads: write their queries as the cache sees them; one more item fills the cache.

    ``queries`` are ``[heads, nope + rope]``, ``wide`` ``[heads, rope + rank]``. Returns how many
    items there are.
    """
    latent, heads, dim = layer["latent"], layer["heads"], layer["head_dim"]
    nope, rope, rank = latent["nope"], latent["rope"], latent["rank"]
    absorb, strips = latent["absorb"], latent["rank"] // TILE
    scaling = layer["scaling"] * np.float32(1)
    while True:
        head = fetch_add(counter, at)
        if head > heads:
            break
        if head == heads:
            _append(layer, state, compressed, cos, sin, paired, key)
        else:
            source, out = queries[head * (nope + rope) :], wide[head * dim :]
            for i in range(nope):
                normed[i] = source[i]
            act = activate(absorb["format"], normed, nope, memory)
            first = head * strips
            multiply_strips(
                absorb, first, first + strips, first, act, rows, buf, scaling, False, out,
                rope - head * rank,
            )  # fmt: skip
            turned(latent, source[nope:], cos, sin, paired, out)
            for i in range(rope):
                out[i] *= scaling
        fetch_add(counter, at + 1)
    return heads + 1


@kernel()
def value_items(counter, at, layer, attended, normed, memory, rows, buf, out):
    """Take heads: turn sums of latents ``[heads, rope + rank]`` into values ``[heads, value]``.

    Returns how many items there are.
    """
    latent, dim = layer["latent"], layer["head_dim"]
    nope, value, rank = latent["nope"], latent["value"], latent["rank"]
    matrix = latent["kv_b"]
    while True:
        head = fetch_add(counter, at)
        if head >= layer["heads"]:
            break
        source = attended[head * dim + latent["rope"] :]
        for i in range(rank):
            normed[i] = source[i]
        act = activate(matrix["format"], normed, rank, memory)
        first = (head * (nope + value) + nope) // TILE
        multiply_strips(
            matrix, first, first + value // TILE, first, act, rows, buf, np.float32(1), False,
            out, -(head + 1) * nope,
        )  # fmt: skip
        fetch_add(counter, at + 1)
    return layer["heads"]
