"""One token through a whole decoder in one parallel region.

A fork and join costs as much as the arithmetic of a small phase, so there is one for all the
layers; between phases threads wait for the last item of the phase before. Only taken items
are waited for, so a thread that is late, or that never comes, holds nobody up: it finds
nothing left to take, and what it computed for itself from numbers that have moved on is not
used.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from cpu_experts.decoder.attention import attention_items
from cpu_experts.decoder.delta import delta_items
from cpu_experts.decoder.mla import query_items, value_items
from cpu_experts.decoder.ops import (
    activate,
    multiply_items,
    normalize,
    project_items,
    route,
)
from cpu_experts.jit.addresses import bytes_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.experts import down_items, up_items
from cpu_experts.kernels.micro import ticks, wait_for
from hybrid.formats.strips import GROUP

#: Where a layer's counters start: whole cache lines apart, attention's last because it has
#: one more for every key-value head.
PROJECT, OUTPUT, ROUTE, EXPERTS, SHARED, QUERY, ABSORB, EXPAND, ATTEND = (
    np.int64(at) for at in range(0, 72, 8)
)
_ZERO, _ONE = np.int64(0), np.int64(1)
#: Columns of ``Work.spent``; its last row is the output head's, in the first of them.
ATTENTION, ROUTED, DENSE = range(3)


class Work(NamedTuple):
    """Buffers of a decode step; those called ``my_`` have a row for every thread.

    ``x`` is the hidden state ``[D]`` and ``x_row`` the same memory as ``[1, D]``; ``rows`` and
    ``firsts`` count up from 0, ``alone`` is the token as a text. ``spent`` ``[layers + 1, 3]`` adds
    up the first thread's ticks.
    """

    x: Any
    x_row: Any
    qkv: Any
    queries: Any
    wide: Any
    expanded: Any
    attended: Any
    parts: Any
    stats: Any
    scores: Any
    h: Any
    h_shared: Any
    counters: Any
    spent: Any
    rows: Any
    zeros: Any
    firsts: Any
    alone: Any
    my_normed: Any
    my_act: Any
    my_buf: Any
    my_queries: Any
    my_scores: Any
    my_key: Any
    my_ids: Any
    my_weights: Any
    my_choice: Any


@kernel()
def _up(experts, counter, act, work, ids, active, h, buf):
    """Gate, up and activation of ``active`` experts; returns when all items are done."""
    blocks = bytes_at(experts["at"], experts["count"] * experts["stride"])
    up_items(
        counter, experts["format"], blocks, experts["stride"], experts["up_strip"],
        experts["up_inner"], act, _ZERO, experts["kind"], experts["alpha"], experts["limit"],
        experts["up_offset"], experts["gated"], experts["up_bias"], experts["intermediate"],
        experts["down_format"], active, ids, work.firsts, work.zeros, h, experts["h_stride"],
        experts["threads"], buf,
    )  # fmt: skip


@kernel()
def _down(experts, counter, work, ids, active, weights, h, buf):
    """Add the experts' weighted output to the hidden state; returns when all items are done."""
    blocks = bytes_at(experts["at"], experts["count"] * experts["stride"])
    items = down_items(
        counter, experts["down_format"], blocks, experts["stride"], experts["section"],
        experts["down_strip"], experts["down_inner"], h, experts["h_stride"],
        experts["down_bias"], active, ids, work.firsts, work.rows, work.rows, active, weights,
        experts["strips"], experts["threads"], work.x_row, buf,
    )  # fmt: skip
    wait_for(counter, np.int64(3), items)


@kernel()
def _compressed_queries(layer, state, counter, cos, sin, paired, work, w):
    """From the first products to queries over a compressed cache, which gets the token's key."""
    normed, buf, memory = work.my_normed[w], work.my_buf[w], work.my_act[w]
    latent, rows = layer["latent"], layer["q"]["rows"]
    q_b, queries = latent["q_b"], work.qkv
    if q_b["rows"]:
        normalize(latent["q_norm"], work.qkv, normed)
        act = activate(q_b["format"], normed, q_b["cols"], memory)
        queries = work.queries
        items = multiply_items(
            counter, QUERY, q_b, act, work.rows, buf, np.float32(1), False, queries
        )
        wait_for(counter, QUERY + 1, items)
    items = query_items(
        counter, ABSORB, layer, state, queries, work.qkv[rows:], cos, sin, paired, normed, memory,
        work.rows, buf, work.my_key[w], work.wide,
    )  # fmt: skip
    wait_for(counter, ABSORB + 1, items)


@kernel()
def _look_back(layer, state, counter, cos, sin, paired, work, w):
    """Attention between its projections; returns what it found, when all of it is there."""
    normed, buf, memory = work.my_normed[w], work.my_buf[w], work.my_act[w]
    compressed = layer["latent"]["rank"] > 0
    if compressed:
        _compressed_queries(layer, state, counter, cos, sin, paired, work, w)
    heads = attention_items(
        counter, ATTEND, layer, state, work.qkv, cos, sin, paired, work.my_queries[w],
        work.wide, work.my_scores[w], work.my_key[w], work.rows, buf, work.parts, work.stats,
        work.attended,
    )  # fmt: skip
    wait_for(counter, ATTEND + 1, heads)
    if not compressed:
        return work.attended
    items = value_items(
        counter, EXPAND, layer, work.attended, normed, memory, work.rows, buf, work.expanded
    )
    wait_for(counter, EXPAND + 1, items)
    return work.expanded


@kernel()
def _attention(layer, states, counter, cos, sin, paired, work, w):
    one = np.float32(1)
    normed, buf, memory = work.my_normed[w], work.my_buf[w], work.my_act[w]
    o = layer["o"]
    normalize(layer["norm"], work.x, normed)
    items = project_items(counter, PROJECT, layer, normed, memory, work.rows, buf, work.qkv)
    wait_for(counter, PROJECT + 1, items)
    if layer["delta"]["key_heads"]:
        heads = delta_items(
            counter, ATTEND, layer["delta"], states, work.alone, work.qkv.reshape(1, -1), buf,
            work.attended.reshape(1, -1),
        )  # fmt: skip
        wait_for(counter, ATTEND + 1, heads)
        found = work.attended
    else:
        found = _look_back(layer, states[0], counter, cos, sin, paired, work, w)
    for i in range(o["cols"]):
        normed[i] = found[i]
    act = activate(o["format"], normed, o["cols"], memory)
    scale = layer["residual"] * one
    items = multiply_items(counter, OUTPUT, o, act, work.rows, buf, scale, True, work.x)
    wait_for(counter, OUTPUT + 1, items)


@kernel()
def _feed_forward(layer, counter, spent, since, work, w):
    """Router, experts and shared experts, or a dense layer; returns when it ended.

    ``spent`` gets the ticks from ``since`` on.
    """
    router, experts, shared = layer["router"], layer["experts"], layer["shared"]
    normed, buf, memory = work.my_normed[w], work.my_buf[w], work.my_act[w]
    ids, weights = work.my_ids[w], work.my_weights[w]
    one = np.float32(1)
    normalize(layer["ffn_norm"], work.x, normed)
    normed[work.x.size : -(-work.x.size // GROUP) * GROUP] = 0
    share = layer["residual"] * one
    top_k = router["top_k"]
    if top_k:
        matrix = router["matrix"]
        act = activate(matrix["format"], normed, matrix["cols"], memory)
        items = multiply_items(counter, ROUTE, matrix, act, work.rows, buf, one, False, work.scores)
        wait_for(counter, ROUTE + 1, items)
        choice = work.my_choice[w]
        count = router["experts"]
        route(router, work.scores, ids, weights, choice[:count], choice[count:])
        for k in range(top_k):
            weights[k] *= layer["residual"]
        if router["gated_shared"]:
            share = layer["residual"] / (one + np.exp(-work.scores[count]))
        since = spend(spent, ATTENTION, since, w)
        act = activate(experts["format"], normed, work.x.size, memory)
        _up(experts, counter[EXPERTS:], act, work, ids, top_k, work.h, buf)
        since = spend(spent, ROUTED, since, w)
    if shared["count"]:
        act = activate(shared["format"], normed, work.x.size, memory)
        _up(shared, counter[SHARED:], act, work, work.firsts, _ONE, work.h_shared, buf)
        since = spend(spent, DENSE, since, w)
    if top_k:
        _down(experts, counter[EXPERTS:], work, ids, top_k, weights, work.h, buf)
        since = spend(spent, ROUTED, since, w)
    if shared["count"]:
        weights[0] = share
        _down(shared, counter[SHARED:], work, work.firsts, _ONE, weights, work.h_shared, buf)
        since = spend(spent, DENSE, since, w)
    return since


@kernel()
def spend(spent, column, since, w):
    """Count the ticks since then in a column, if this is the first thread; return the time."""
    now = ticks()
    if w == 0:
        spent[column] += now - since
    return now


@kernel()
def _walk(layers, states, head, cos, sin, paired, work, logits, w):
    since = ticks()
    for i in range(layers.size):
        counter, spent = work.counters[i], work.spent[i]
        _attention(layers[i], states[i : i + 1], counter, cos, sin, paired, work, w)
        since = spend(spent, ATTENTION, since, w)
        since = _feed_forward(layers[i], counter, spent, since, work, w)
    if head.size == 0:
        return
    last, normed = head[0], work.my_normed[w]
    matrix = last["matrix"]
    normalize(last["norm"], work.x, normed)
    act = activate(matrix["format"], normed, matrix["cols"], work.my_act[w])
    scale = last["scale"] * np.float32(1)
    multiply_items(
        work.counters[layers.size], OUTPUT, matrix, act, work.rows, work.my_buf[w], scale,
        False, logits,
    )  # fmt: skip
    spend(work.spent[layers.size], ATTENTION, since, w)


@kernel()
def clock():
    """Return the time that ``Work.spent`` is counted in."""
    return ticks()


@kernel(parallel=True)
def decode(layers, states, head, cos, sin, paired, work, logits, threads):
    """Move ``work.x``, the embedded token, through all layers and write its logits.

    Without a ``head`` there are no logits. Keys and values of the token are written behind
    the ``length`` positions of each state.
    """
    work.counters[:] = 0
    for w in prange(threads):
        _walk(layers, states, head, cos, sin, paired, work, logits, np.int64(w))
