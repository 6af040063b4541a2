"""Attention of one token: its key and value join the cache, its queries look at all of it.

In every page of the cache, which may be its only one, keys lie in strips of 16 positions
``[kv_heads, page / 16, head_dim, 16]``, values in strips of 16 dimensions
``[kv_heads, head_dim / 16, page, 16]``, as half precision floats: matrices as
:mod:`hybrid.formats.strips` lays them out, so that attention is two micro-kernel products. Half
precision is what is read per token with a long past; queries, weights and sums are float32.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.decoder.ops import normalize, open_gate, rotate
from cpu_experts.jit.addresses import bytes_at, floats_at, words_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.experts import MIDDLE, WIDE
from cpu_experts.kernels.micro import (
    ROW_BLOCKS,
    add_strip,
    copy_strip,
    exp_all,
    fetch_add,
    largest_of,
    strip_dot,
    to_half,
)
from hybrid.formats.strips import TILE

#: Positions that one item of attention looks at.
CHUNK = 512
#: Arguments of one type: numba compiles a function anew for every number written out in a call.
_ZERO, _ONE = np.int64(0), np.int64(1)

#: The largest number in half precision.
LARGEST_HALF = np.float32(65504)
_wide, _middle, _one = (strip_dot("f16", n) for n in ROW_BLOCKS)


@kernel()
def dot_halves(w, w_at, act, stride, rows, count, inner, out):
    """Multiply one strip of halves with the first ``count`` rows into ``out`` ``[count, 16]``."""
    t = np.int64(0)
    while t < count:
        o = TILE * t
        if count - t >= WIDE:
            _wide(w, w_at, w_at, act, stride, rows, t, inner, out, o)
            t += WIDE
        elif count - t >= MIDDLE:
            _middle(w, w_at, w_at, act, stride, rows, t, inner, out, o)
            t += MIDDLE
        else:
            _one(w, w_at, w_at, act, stride, rows, t, inner, out, o)
            t += 1


@kernel(parallel=True)
def pack_past(keys, values, packed_keys, packed_values):
    """Lay ``keys`` and ``values`` ``[H, T, dim]`` float32 out in strips of halves.

    ``packed_keys`` ``[H, capacity / 16, dim, 16]`` and ``packed_values``
    ``[H, strips, capacity, 16]`` hold the bits of the halves as uint16.
    """
    heads, length, dim = keys.shape
    blocks = -(-length // TILE)
    from_keys, from_values = keys.reshape(-1), values.reshape(-1)
    to_keys, to_values = packed_keys.reshape(-1), packed_values.reshape(-1)
    key_blocks, strips, capacity = (
        packed_keys.shape[1],
        packed_values.shape[1],
        packed_values.shape[2],
    )
    for item in prange(heads * blocks):
        head, block = item // blocks, item % blocks
        start = block * TILE
        stop = min(start + TILE, length)
        base = (head * key_blocks + block) * dim * TILE
        for p in range(start, stop):
            source = from_keys[(head * length + p) * dim :]
            target = to_keys[base + p - start :]
            for i in range(dim):
                target[i * TILE] = to_half(source[i])
        for s in range(strips):
            for p in range(start, stop):
                source = from_values[(head * length + p) * dim + s * TILE :]
                target = to_values[((head * strips + s) * capacity + p) * TILE :]
                for i in range(min(TILE, dim - s * TILE)):
                    target[i] = to_half(source[i])


@kernel(reassociate=True)
def prepare(norm, clip, side, head, dim, cos, sin, paired, out):
    """Norm, clip and turn one head of ``side`` (the queries or keys) into ``out[:dim]``."""
    source = side[head * dim :]
    if norm["size"] == dim:
        normalize(norm, source, out)
    else:
        for i in range(dim):
            out[i] = source[i]
    if norm["size"] > dim:  # over all heads together
        squares = np.float32(0)
        for i in range(side.size):
            squares += side[i] * side[i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(side.size) + norm["eps"])
        weight = floats_at(norm["weight"], side.size)[head * dim :]
        for i in range(dim):
            out[i] *= scale * weight[i]
    if clip < np.inf:
        for i in range(dim):
            out[i] = min(max(out[i], -clip), clip)
    rotate(out, cos, sin, paired)


@kernel()
def page_at(state, position):
    """Return how many bytes behind the state's addresses the page of a position is."""
    number = position // state["page"]
    return words_at(state["table"], number + 1)[number]


@kernel()
def keys_of(state, head, dim, begin, end, queries, rows, count, buf, scores, width):
    """Write products of ``count`` queries with keys of positions from ``begin`` to ``end``.

    ``begin`` is a multiple of 16; rows of ``scores`` are ``width`` apart.
    """
    page, p = state["page"], begin
    while p < end:
        till = min(end, p // page * page + page)
        keys = bytes_at(state["keys"] + page_at(state, p), 2 * (head + 1) * page * dim)
        first = head * page + p % page - p
        for q in range(p, till, TILE):
            dot_halves(keys, 2 * (first + q) * dim, queries, 4 * dim, rows, count, dim, buf)
            for r in range(count):
                copy_strip(buf, r * TILE, scores, r * width + q - begin)
        p = till


@kernel()
def values_of(state, head, strips, strip, begin, end, weights, width, order, count, buf, out, at):
    """Add a strip of ``count`` rows' weighted sums of values, ``begin`` to ``end``, to ``out``.

    ``weights`` are the bytes of rows of ``width`` float32, the first of them that of ``begin``;
    ``out`` is flat, and ``at`` how far apart its rows are. The caller has set it to what is added
    to.
    """
    page, p = state["page"], begin
    while p < end:
        till = min(end, p // page * page + page)
        size = 2 * (head + 1) * strips * page * TILE
        values = bytes_at(state["values"] + page_at(state, p), size)
        first = 2 * ((head * strips + strip) * page + p % page) * TILE
        dot_halves(
            values, first, weights[4 * (p - begin) :], np.int64(4 * width), order, count, till - p,
            buf,
        )  # fmt: skip
        for r in range(count):
            add_strip(buf, r * TILE, np.float32(1), out, r * at + strip * TILE)
        p = till


@kernel()
def _halves(address, count):
    return bytes_at(address, 2 * count).view(np.uint16)


@kernel()
def append(layer, state, slot, head, keys, values, cos, sin, paired, key):
    """Write one head's key and value of a token into the cache.

    ``keys`` and ``values`` are the token's projections; ``key`` ``[dim]`` is scratch.
    """
    dim, clip = layer["head_dim"], layer["clip"]
    prepare(layer["k_norm"], clip, keys, head, dim, cos, sin, paired, key)
    keep(state, head, slot, dim, key, values[head * dim :], clip)


@kernel()
def keep(state, head, slot, dim, key, value, clip):
    """Write ``key`` and the clipped ``value`` ``[dim]`` of a head into the cache.

    The state notes when one of them is beyond half precision.
    """
    largest = np.float32(0)
    for i in range(dim):
        largest = max(largest, abs(key[i]), min(abs(value[i]), clip))
    if largest > LARGEST_HALF:
        state["beyond"] = np.int64(1)
    page, strips = state["page"], -(-dim // TILE)
    before, place = page_at(state, slot), slot % page
    to_keys = _halves(state["keys"] + before, (head + 1) * page * dim)
    to_values = _halves(state["values"] + before, (head + 1) * strips * page * TILE)
    strip = to_keys[((head * (page // TILE) + place // TILE) * dim) * TILE + place % TILE :]
    for i in range(dim):
        strip[i * TILE] = to_half(key[i])
    for s in range(strips):
        strip = to_values[((head * strips + s) * page + place) * TILE :]
        part = value[s * TILE :]
        for i in range(min(TILE, dim - s * TILE)):
            strip[i] = to_half(min(max(part[i], -clip), clip))


@kernel()
def _weigh(scores, at, first, last, count):
    """Turn scores into ``exp(score - largest)``, zero outside ``first : last``.

    Returns the largest score and the sum of the weights.
    """
    scores[at : at + first] = -np.inf
    scores[at + last : at + count] = -np.inf
    largest = largest_of(scores, at, count)
    total = exp_all(scores, at, count, largest)
    scores[at : at + first] = 0
    scores[at + last : at + count] = 0
    return largest, total


@kernel()
def _attend(layer, state, head, chunk, queries, scores, rows, buf, parts, part_at, stats):
    """One chunk of positions for the query heads of one key-value head.

    Writes their weighted sums of values to ``parts[part_at + t]`` and largest score and sum of
    weights to ``stats``, unnormalised.
    """
    dim, many = layer["head_dim"], layer["heads"] // layer["kv_heads"]
    stop = min(state["length"] + 1, (chunk + 1) * CHUNK)
    start = chunk * CHUNK
    if layer["window"]:
        start = max(start, state["length"] + 1 - layer["window"])
    base = start // TILE * TILE
    strips = -(-dim // TILE)
    keys_of(
        state, head, dim, base, stop, queries.view(np.uint8), rows, many, buf, scores,
        np.int64(CHUNK),
    )  # fmt: skip
    count = -(-(stop - base) // TILE) * TILE
    for t in range(many):
        largest, total = _weigh(scores, t * CHUNK, start - base, stop - base, count)
        stats[part_at + t, 0] = largest
        stats[part_at + t, 1] = total
        parts[part_at + t] = 0
    width = parts.shape[1]
    act, found = scores.view(np.uint8), parts.reshape(-1)[part_at * width :]
    for s in range(strips):
        values_of(
            state, head, strips, s, base, stop, act, np.int64(CHUNK), rows, many, buf, found, width
        )


@kernel()
def _merge(layer, head, chunks, parts, stats, qkv, attended):
    """Add up the chunks of the query heads of one key-value head, and open their gates."""
    dim = layer["head_dim"]
    many = layer["heads"] // layer["kv_heads"]
    for t in range(many):
        query_head = head * many + t
        first = head * chunks * many + t
        largest = np.float32(-np.inf)
        for c in range(chunks):
            largest = max(largest, stats[first + c * many, 0])
        total = np.float32(0)
        if layer["sinks"]:
            sink = floats_at(layer["sinks"], layer["heads"])[query_head]
            largest = max(largest, sink)
            total = np.exp(sink - largest)
        out = attended[query_head * dim :]
        for i in range(dim):
            out[i] = 0
        for c in range(chunks):
            at = first + c * many
            part, weight = parts[at], np.exp(stats[at, 0] - largest)
            total += weight * stats[at, 1]
            for i in range(dim):
                out[i] += weight * part[i]
        for i in range(dim):
            out[i] /= total
        if layer["gated"]:
            open_gate(qkv[(2 * query_head + 1) * dim :], out, dim)


@kernel()
def attention_items(
    counter, at, layer, state, qkv, cos, sin, paired, queries, wide, scores, key, rows, buf,
    parts, stats, attended,
):  # fmt: skip
    """Take (key-value head, chunk) items; whoever ends a head's last chunk merges the head.

    Returns how many heads there are to wait for. ``counter[at + 2 + head]`` counts chunks. With a
    compressed cache, ``wide`` holds the queries, and the cache the token, whose one key all see.
    """
    compressed = layer["latent"]["rank"] > 0
    dim = layer["head_dim"]
    many = layer["heads"] // layer["kv_heads"]
    first_chunk = 0
    if layer["window"]:
        first_chunk = max(0, state["length"] + 1 - layer["window"]) // CHUNK
    chunks = state["length"] // CHUNK + 1 - first_chunk
    in_q = layer["q"]["rows"]
    in_k = in_q + layer["k"]["rows"]
    while True:
        item = fetch_add(counter, at)
        if item >= layer["kv_heads"] * chunks:
            break
        head, chunk = item // chunks, item % chunks
        mine, stored = queries, head
        if compressed:
            mine, stored = wide[head * many * dim :], _ZERO
        else:
            if chunk == chunks - 1:
                append(
                    layer, state, state["length"], head, qkv[in_q:in_k], qkv[in_k:], cos, sin,
                    paired, key,
                )  # fmt: skip
            for t in range(many):
                prepare(
                    layer["q_norm"], layer["clip"], qkv[:in_q],
                    (head * many + t) * (1 + layer["gated"]), dim, cos, sin, paired,
                    queries[t * dim :],
                )  # fmt: skip
            scaling = layer["scaling"]
            for i in range(many * dim):
                queries[i] *= scaling
        part_at = (head * chunks + chunk) * many
        _attend(
            layer, state, stored, first_chunk + chunk, mine, scores, rows, buf, parts, part_at,
            stats,
        )  # fmt: skip
        if fetch_add(counter, at + 2 + head) == chunks - 1:
            _merge(layer, head, chunks, parts, stats, qkv, attended)
            fetch_add(counter, at + 1)
    return layer["kv_heads"]
