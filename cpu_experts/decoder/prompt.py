"""Attention of many tokens at once, over the cache that single tokens use.

First all keys and values join the cache, then items of a key-value head and a few tokens are
taken off a counter, the longest first. An item walks over its positions chunk by chunk and
keeps, for every row (a query head of a token), the largest score so far, the sum of weights and
the weighted sum of values, rescaled whenever a larger score turns up (2205.14135).
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.decoder.attention import append, keys_of, prepare, values_of
from cpu_experts.jit.addresses import floats_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.micro import exp_all, fetch_add, largest_of
from hybrid.formats.strips import TILE

#: Positions that a row's scores are computed for at a time.
SPAN = 256
#: Rows that an item has, about.
ROWS = 64
#: Of one type: numba compiles a function anew for every number written out in a call.
_ZERO = np.int64(0)


@kernel()
def _soften(scores, at, first, last, count, row, dim, stats, sums):
    """Turn a row's scores in ``first : last`` into weights relative to the largest so far."""
    first, last = min(first, count), max(last, 0)
    scores[at : at + first] = -np.inf
    scores[at + last : at + count] = -np.inf
    largest = max(stats[row, 0], largest_of(scores, at, count))
    if largest == -np.inf:  # nothing to see yet
        scores[at : at + count] = 0
        return
    total = exp_all(scores, at, count, largest)
    scores[at : at + first] = 0
    scores[at + last : at + count] = 0
    fade = np.exp(stats[row, 0] - largest)
    stats[row, 0] = largest
    stats[row, 1] = stats[row, 1] * fade + total
    if fade < 1:
        own = sums[row]
        for i in range(dim):
            own[i] *= fade


@kernel()
def look(
    layer, state, head, start, lowest, begin, end, queries, places, rows, count, scores, buf, stats,
    sums,
):  # fmt: skip
    """Let ``count`` rows, whose first token is at position ``start``, see ``begin : end`` of it.

    ``begin`` is a multiple of 16, ``head`` one that the cache has; the queries are the rows
    ``places`` of ``queries`` ``[.., head_dim]``, flat. What lies before ``lowest`` is no position
    of the text: only a token there sees itself.
    """
    dim, window = layer["head_dim"], layer["window"]
    many = layer["heads"] // layer["kv_heads"]
    strips = -(-dim // TILE)
    act, weights = queries.view(np.uint8), scores.view(np.uint8)
    flat = sums.reshape(-1)
    base = begin
    while base < end:
        stop = min(base + SPAN, end)
        keys_of(state, head, dim, base, stop, act, places, count, buf, scores, np.int64(SPAN))
        width = -(-(stop - base) // TILE) * TILE
        for r in range(count):
            position = start + r // many
            seen = min(lowest, position)
            if window:
                seen = max(seen, position + 1 - window)
            first = max(seen - base, 0)
            last = min(position + 1 - base, width)
            _soften(scores, r * SPAN, first, last, width, r, dim, stats, sums)
        for s in range(strips):
            values_of(
                state, head, strips, s, base, stop, weights, np.int64(SPAN), rows, count, buf,
                flat, sums.shape[1],
            )  # fmt: skip
        base += SPAN


@kernel()
def _attend_items(
    counter, layer, state, q, cos, sin, paired, tokens_an_item, queries, rows, scores, buf,
    stats, sums, out,
):  # fmt: skip
    dim, kv_heads = layer["head_dim"], layer["kv_heads"]
    many = layer["heads"] // kv_heads
    parts = -(-q.shape[0] // tokens_an_item)
    scaling = layer["scaling"]
    while True:
        item = fetch_add(counter, np.int64(0))
        if item >= parts * kv_heads:
            break
        part, head = parts - 1 - item // kv_heads, item % kv_heads
        token = part * tokens_an_item
        count = many * (min(token + tokens_an_item, q.shape[0]) - token)
        for r in range(count):
            t, query_head = token + r // many, head * many + r % many
            row = queries[r * dim : (r + 1) * dim]
            prepare(
                layer["q_norm"], layer["clip"], q[t], query_head, dim, cos[t], sin[t], paired, row
            )
            for i in range(dim):
                row[i] *= scaling
            stats[r, 0], stats[r, 1] = -np.inf, 0
            if layer["sinks"]:
                stats[r, 0] = floats_at(layer["sinks"], layer["heads"])[query_head]
                stats[r, 1] = 1
            sums[r, :] = 0
        start, window = state["length"] + token, layer["window"]
        begin = max(_ZERO, start + 1 - window) // TILE * TILE if window else _ZERO
        look(
            layer, state, head, start, _ZERO, begin, start + count // many, queries, rows, rows,
            count, scores, buf, stats, sums,
        )  # fmt: skip
        for r in range(count):
            t, query_head = token + r // many, head * many + r % many
            target, own, total = out[t, query_head * dim :], sums[r], stats[r, 1]
            for i in range(dim):
                target[i] = own[i] / total


@kernel(parallel=True)
def attend(
    layers, states, q, k, v, cos, sin, paired, tokens_an_item, counter, rows, my_key, my_queries,
    my_scores, my_buf, my_stats, my_sums, out, threads,
):  # fmt: skip
    """Attention of ``T`` tokens of one layer, from projections to what ``o`` multiplies.

    ``q``, ``k``, ``v`` and ``out`` are ``[T, heads * dim]`` (key-value heads for two of them),
    ``cos`` and ``sin`` ``[T, pairs]``. Keys and values are written behind ``length`` positions,
    for which there is room; ``layers`` and ``states`` have one entry.
    """
    counter[:] = 0
    tokens, kv_heads = k.shape[0], layers[0]["kv_heads"]
    for w in prange(threads):
        for t in range(w * tokens // threads, (w + 1) * tokens // threads):
            for head in range(kv_heads):
                append(
                    layers[0], states[0], states[0]["length"] + t, head, k[t], v[t], cos[t],
                    sin[t], paired, my_key[w],
                )  # fmt: skip
    for w in prange(threads):
        _attend_items(
            counter, layers[0], states[0], q, cos, sin, paired, tokens_an_item, my_queries[w],
            rows, my_scores[w], my_buf[w], my_stats[w], my_sums[w], out,
        )  # fmt: skip
