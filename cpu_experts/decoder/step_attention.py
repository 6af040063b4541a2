"""Attention of a step of several tokens: every one sees its own text up to itself.

The step has tokens of some texts, one text behind another; where a text's keys and values are, its
:data:`~cpu_experts.decoder.records.TEXT` says. First the tokens' keys and values join the caches.
Then threads take items of a key-value head, some tokens of a text and a chunk of its positions, and
whoever ends the last chunk of such a run adds the chunks up.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np

from cpu_experts.decoder.attention import CHUNK, keep, prepare
from cpu_experts.decoder.mla import turned
from cpu_experts.decoder.ops import activate, normalize, open_gate
from cpu_experts.decoder.prompt import ROWS, SPAN, look
from cpu_experts.decoder.step_parts import multiply_tokens
from cpu_experts.jit.addresses import floats_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.dots import is_quantized
from cpu_experts.kernels.micro import fetch_add, wait_for
from hybrid.formats.strips import TILE

#: Runs are cut into chunks of positions up to about so many items a layer.
ITEMS = np.int64(64)
_ZERO, _ONE = np.int64(0), np.int64(1)


@kernel()
def prepare_heads(
    counter, at, layer, states, cos, sin, paired, qkv, count, texts, owners, key, looking
):
    """Take heads of tokens: their key and value join the cache, their queries are made ready.

    ``looking`` ``[count, heads * head_dim]`` gets the queries. Returns when all are done.
    """
    dim, kv_heads, clip = layer["head_dim"], layer["kv_heads"], layer["clip"]
    many, scaling = layer["heads"] // kv_heads, layer["scaling"]
    in_q = layer["q"]["rows"]
    in_k = in_q + layer["k"]["rows"]
    while True:
        item = fetch_add(counter, at)
        if item >= count * kv_heads:
            break
        n, head = item // kv_heads, item % kv_heads
        row, text = qkv[n], texts[owners[n]]
        state, stored = states[text["row"]], text["place"] * kv_heads + head
        keys, values = row[in_q:in_k], row[in_k + head * dim :]
        prepare(layer["k_norm"], clip, keys, head, dim, cos[n], sin[n], paired, key)
        slot = state["length"] + n - text["first"]
        keep(state, stored, slot, dim, key, values, clip)
        for t in range(head * many, (head + 1) * many):
            query = looking[n, t * dim : (t + 1) * dim]
            at_query = t * (1 + layer["gated"])
            prepare(layer["q_norm"], clip, row[:in_q], at_query, dim, cos[n], sin[n], paired, query)
            for i in range(dim):
                query[i] *= scaling
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, count * kv_heads)


@kernel()
def prepare_latent(
    counter, at, layer, states, cos, sin, paired, queries, qkv, count, texts, owners, order, normed,
    act, buf, key, looking,
):  # fmt: skip
    """Take heads: write all tokens' queries as a compressed cache sees them, and fill the cache.

    ``queries`` are ``[count, heads * (nope + rope)]``, ``looking`` ``[count, heads * head_dim]``;
    ``normed`` ``[count, ..]`` and ``act`` ``[count, bytes]`` are scratch. Returns when all are
    done.
    """
    latent, heads, dim = layer["latent"], layer["heads"], layer["head_dim"]
    nope, rope, rank = latent["nope"], latent["rope"], latent["rank"]
    absorb, strips, rows = latent["absorb"], latent["rank"] // TILE, layer["q"]["rows"]
    scaling, no_clip = layer["scaling"] * np.float32(1), np.float32(np.inf)
    while True:
        item = fetch_add(counter, at)
        if item >= heads + count:
            break
        if item >= heads:
            n = item - heads
            text = texts[owners[n]]
            state = states[text["row"]]
            compressed, kept = qkv[n, rows:], key[:dim]
            turned(latent, compressed[rank:], cos[n], sin[n], paired, kept)
            normalize(latent["kv_norm"], compressed, kept[rope:])
            slot = state["length"] + n - text["first"]
            keep(state, text["place"], slot, dim, kept, kept, no_clip)
        else:
            begin = item * (nope + rope)
            given, stride = _heads_of(absorb["format"], queries, begin, nope, count, normed, act)
            first = item * strips
            multiply_tokens(
                absorb, first, first + strips, first, given, stride, order, count, buf, scaling,
                False, looking, item * (dim - rank) + rope,
            )  # fmt: skip
            for n in range(count):
                out = looking[n, item * dim : item * dim + rope]
                turned(latent, queries[n, begin + nope :], cos[n], sin[n], paired, out)
                for i in range(rope):
                    out[i] *= scaling
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, heads + count)


@kernel()
def _heads_of(fmt, source, begin, cols, count, normed, act):
    """Copy the columns from ``begin`` on of all tokens; return them as a format reads them."""
    for n in range(count):
        part, out = source[n, begin : begin + cols], normed[n]
        for i in range(cols):
            out[i] = part[i]
        activate(fmt, out, cols, act[n])
    if is_quantized(fmt):
        return act.reshape(-1), np.int64(act.shape[1])
    return normed.reshape(-1).view(np.uint8), np.int64(4 * normed.shape[1])


@kernel()
def expand_values(counter, at, layer, attended, count, order, normed, act, buf, out):
    """Take heads: turn all tokens' sums of latents into values ``[count, heads * value]``.

    Returns when all are done.
    """
    latent, dim = layer["latent"], layer["head_dim"]
    nope, value, rank = latent["nope"], latent["value"], latent["rank"]
    matrix, one = latent["kv_b"], np.float32(1)
    while True:
        head = fetch_add(counter, at)
        if head >= layer["heads"]:
            break
        given, stride = _heads_of(
            matrix["format"], attended, head * dim + latent["rope"], rank, count, normed, act
        )
        first = (head * (nope + value) + nope) // TILE
        multiply_tokens(
            matrix, first, first + value // TILE, first, given, stride, order, count, buf, one,
            False, out, -(head + 1) * nope,
        )  # fmt: skip
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, layer["heads"])


@kernel()
def _merge(chunks, rows, dim, parts, stats, first, out, out_at):
    """Add up the chunks of one row, ``rows`` places apart from ``first`` on."""
    largest = np.float32(-np.inf)
    for c in range(chunks):
        largest = max(largest, stats[first + c * rows, 0])
    total = np.float32(0)
    target = out[out_at : out_at + dim]
    target[:] = 0
    for c in range(chunks):
        at = first + c * rows
        part, weight = parts[at], np.exp(stats[at, 0] - largest)
        total += weight * stats[at, 1]
        for i in range(dim):
            target[i] += weight * part[i]
    for i in range(dim):
        target[i] /= total


@kernel()
def attend_tokens(
    counter, at, layer, states, texts, looking, order, places, scores, buf, own_stats, own_sums,
    parts, stats, qkv, attended,
):  # fmt: skip
    """Take (key-value head, tokens, chunk) items; returns when all tokens have attended.

    ``looking`` are the queries ``[count, heads * head_dim]``, flat. ``counter[at + 2 + run]``
    counts a run's chunks; chunks of one run lie in ``parts`` and ``stats`` one behind another.
    """
    dim, kv_heads, window = layer["head_dim"], layer["kv_heads"], layer["window"]
    heads, many = layer["heads"], layer["heads"] // layer["kv_heads"]
    compressed = layer["latent"]["rank"] > 0
    most = max(_ONE, ROWS // many)  # tokens of a run
    rows_all, total, longest = most * many, _ZERO, _ZERO
    for text in texts:
        total += -(-text["tokens"] // most) * kv_heads
        seen = states[text["row"]]["length"] + text["tokens"]
        if window:
            seen = min(seen, window + text["tokens"])
        longest = max(longest, seen)
    chunks = max(_ONE, min(-(-longest // CHUNK), ITEMS // total))
    while True:
        item = fetch_add(counter, at)
        if item >= total * chunks:
            break
        run, chunk = item // chunks, item % chunks
        group, head, at_text = run // kv_heads, run % kv_heads, _ZERO
        while group >= -(-texts[at_text]["tokens"] // most):
            group -= -(-texts[at_text]["tokens"] // most)
            at_text += 1
        text, token = texts[at_text], group * most
        state = states[text["row"]]
        length, here = state["length"], min(most, text["tokens"] - token)
        n, rows, start = text["first"] + token, here * many, length + token
        lowest = max(_ZERO, length + text["begins"])
        begin = min(lowest, start)
        if window:
            begin = max(begin, start + 1 - window)
        begin = begin // TILE * TILE
        end = start + here
        span = -(-(end - begin) // (chunks * SPAN)) * SPAN
        begin += chunk * span
        for r in range(rows):
            own, query_head = n + r // many, head * many + r % many
            places[r] = own * heads + query_head
            own_stats[r, 0], own_stats[r, 1] = -np.inf, 0
            if layer["sinks"] and chunk == 0:
                own_stats[r, 0] = floats_at(layer["sinks"], heads)[query_head]
                own_stats[r, 1] = 1
            own_sums[r, :] = 0
        look(
            layer, state, text["place"] if compressed else text["place"] * kv_heads + head, start,
            lowest, begin, min(end, begin + span), looking, places, order, rows, scores, buf,
            own_stats, own_sums,
        )  # fmt: skip
        first = run * chunks * rows_all
        for r in range(rows):
            to, sums = first + chunk * rows_all + r, own_sums[r]
            if chunks == 1:
                row, weight = attended[n + r // many], own_stats[r, 1]
                target = row[(head * many + r % many) * dim :]
                for i in range(dim):
                    target[i] = sums[i] / weight
            else:
                stats[to, 0], stats[to, 1] = own_stats[r, 0], own_stats[r, 1]
                part = parts[to]
                for i in range(dim):
                    part[i] = sums[i]
        if fetch_add(counter, at + 2 + run) == chunks - 1:
            if chunks > 1:
                for r in range(rows):
                    _merge(
                        chunks, rows_all, dim, parts, stats, first + r, attended[n + r // many],
                        (head * many + r % many) * dim,
                    )  # fmt: skip
            if layer["gated"]:
                for r in range(rows):
                    own, query_head = n + r // many, head * many + r % many
                    of_head = attended[own, query_head * dim : (query_head + 1) * dim]
                    open_gate(qkv[own, (2 * query_head + 1) * dim :], of_head, dim)
            fetch_add(counter, at + 1)
    wait_for(counter, at + 1, total)
