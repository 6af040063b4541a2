"""Several tokens through a whole decoder in one parallel region: weights are read once for all.

As in :mod:`cpu_experts.decoder.decode_step`, which is for one token, threads wait for the last
item of a phase and for nothing else. A thread that is late finds nothing left to take: how many
items a phase has is known from what stays the same during the step, or is written beside the
layer's own counters.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from cpu_experts.decoder.decode_step import ATTENTION, DENSE, ROUTED, spend
from cpu_experts.decoder.delta import delta_items
from cpu_experts.decoder.ops import route
from cpu_experts.decoder.step_attention import (
    attend_tokens,
    expand_values,
    prepare_heads,
    prepare_latent,
)
from cpu_experts.decoder.step_parts import (
    activate_tokens,
    given,
    multiply_all,
    normalize_tokens,
    project_all,
)
from cpu_experts.jit.addresses import bytes_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.experts import down_items, sort_pairs, up_items
from cpu_experts.kernels.micro import fetch_add, ticks, wait_for

#: Where a layer's counters start: whole cache lines apart, attention's last because it has one
#: more for every run.
(
    NORM, PROJECT, QUERY_NORM, QUERY, PREPARE, EXPAND, ACTIVATE, OUTPUT, FFN_NORM, ROUTE, CHOOSE,
    EXPERTS, SHARED, ATTEND,
) = (np.int64(at) for at in range(0, 112, 8))  # fmt: skip
_ZERO, _ONE = np.int64(0), np.int64(1)


class Work(NamedTuple):
    """Buffers of a step of up to ``N`` tokens; those called ``my_`` have a part for every thread.

    ``x`` is the hidden state ``[N, D]``; ``acts`` ``[3, N, bytes]`` what quantized products read
    of it. ``order`` counts up from 0; ``first`` and ``pairs`` sort ``ids`` by expert, and ``rows``
    are the pairs' tokens. ``everyone`` is the same for the one shared expert. ``spent`` is as in
    :class:`cpu_experts.decoder.decode_step.Work`.
    """

    x: Any
    normed: Any
    acts: Any
    qkv: Any
    queries: Any
    looking: Any
    attended: Any
    expanded: Any
    parts: Any
    stats: Any
    scores: Any
    ids: Any
    weights: Any
    shares: Any
    experts: Any
    first: Any
    pairs: Any
    rows: Any
    h: Any
    h_shared: Any
    counters: Any
    spent: Any
    order: Any
    zeros: Any
    everyone: Any
    my_buf: Any
    my_places: Any
    my_scores: Any
    my_stats: Any
    my_sums: Any
    my_key: Any
    my_normed: Any
    my_act: Any
    my_ids: Any
    my_weights: Any
    my_choice: Any


@kernel()
def _look_back(layer, states, counter, cos, sin, paired, work, count, texts, owners, w):
    """Attention between its projections; returns what it found, when all of it is there."""
    one, buf, order, acts = np.float32(1), work.my_buf[w], work.order, work.acts
    latent, heads = layer["latent"], layer["heads"]
    looking = work.looking[: count * heads * layer["head_dim"]]
    by_token = looking.reshape(count, heads * layer["head_dim"])
    compressed = latent["rank"] > 0
    if compressed:
        queries, q_b = work.qkv, latent["q_b"]
        if q_b["rows"]:
            queries, only = work.queries, (q_b["format"], _ZERO, _ZERO)
            normalize_tokens(
                counter, QUERY_NORM, latent["q_norm"], only, work.qkv, order, count, work.normed,
                acts,
            )  # fmt: skip
            act, stride = given(only, q_b["format"], work.normed, acts)
            multiply_all(counter, QUERY, q_b, act, stride, order, count, buf, one, False, queries)
        prepare_latent(
            counter, PREPARE, layer, states, cos, sin, paired, queries, work.qkv, count, texts,
            owners, order, work.my_normed[w], work.my_act[w], buf, work.my_key[w], by_token,
        )  # fmt: skip
    else:
        prepare_heads(
            counter, PREPARE, layer, states, cos, sin, paired, work.qkv, count, texts, owners,
            work.my_key[w], by_token,
        )  # fmt: skip
    attend_tokens(
        counter, ATTEND, layer, states, texts, looking, order, work.my_places[w],
        work.my_scores[w], buf, work.my_stats[w], work.my_sums[w], work.parts, work.stats,
        work.qkv, work.attended,
    )  # fmt: skip
    if not compressed:
        return work.attended
    expand_values(
        counter, EXPAND, layer, work.attended, count, order, work.my_normed[w], work.my_act[w],
        buf, work.expanded,
    )  # fmt: skip
    return work.expanded


@kernel()
def _attention(layer, states, counter, cos, sin, paired, work, count, texts, owners, w):
    one, buf, order, acts = np.float32(1), work.my_buf[w], work.order, work.acts
    q, o, delta = layer["q"], layer["o"], layer["delta"]
    formats = (q["format"], layer["k"]["format"], layer["v"]["format"])
    normalize_tokens(counter, NORM, layer["norm"], formats, work.x, order, count, work.normed, acts)
    project_all(counter, PROJECT, layer, formats, work.normed, acts, order, count, buf, work.qkv)
    found = work.attended
    if delta["key_heads"]:
        items = delta_items(counter, ATTEND, delta, states, texts, work.qkv, buf, found)
        wait_for(counter, ATTEND + 1, items)
    else:
        found = _look_back(layer, states, counter, cos, sin, paired, work, count, texts, owners, w)
    activate_tokens(counter, ACTIVATE, o["format"], found, o["cols"], count, acts)
    act, stride = given((o["format"], _ZERO, _ZERO), o["format"], found, acts)
    scale = layer["residual"] * one
    multiply_all(counter, OUTPUT, o, act, stride, order, count, buf, scale, True, work.x)


@kernel()
def _choose(layer, counter, work, count, w):
    """Take tokens: their experts and weights; whoever ends the last token sorts them all.

    Returns how many experts have tokens.
    """
    router, one = layer["router"], np.float32(1)
    top_k, experts = router["top_k"], router["experts"]
    ids, weights, choice = work.my_ids[w], work.my_weights[w], work.my_choice[w]
    while True:
        n = fetch_add(counter, CHOOSE)
        if n >= count:
            break
        scores = work.scores[n]
        route(router, scores, ids, weights, choice[:experts], choice[experts:])
        to_ids, to_weights = work.ids[n * top_k :], work.weights[n * top_k :]
        for k in range(top_k):
            to_ids[k] = ids[k]
            to_weights[k] = weights[k] * layer["residual"]
        share = layer["residual"] * one
        if router["gated_shared"]:
            share = layer["residual"] / (one + np.exp(-scores[experts]))
        work.shares[n] = share
        if fetch_add(counter, CHOOSE + 1) == count - 1:
            chosen = work.ids[: count * top_k]
            counter[CHOOSE + 3] = sort_pairs(chosen, experts, work.experts, work.first, work.pairs)
            for p in range(count * top_k):
                work.rows[p] = work.pairs[p] // top_k
            fetch_add(counter, CHOOSE + 2)
    wait_for(counter, CHOOSE + 2, _ONE)
    return counter[CHOOSE + 3]


@kernel()
def _share_alike(layer, counter, work, count):
    """Let one thread give the MLP of a layer without router to all tokens; returns when it has."""
    if fetch_add(counter, CHOOSE) == 0:
        work.shares[:count] = layer["residual"]
        fetch_add(counter, CHOOSE + 2)
    wait_for(counter, CHOOSE + 2, _ONE)


@kernel()
def _up(experts, counter, act, stride, active, ids, first, rows, h, buf):
    """Gate, up and activation of ``active`` experts; returns when all items are done."""
    blocks = bytes_at(experts["at"], experts["count"] * experts["stride"])
    up_items(
        counter, experts["format"], blocks, experts["stride"], experts["up_strip"],
        experts["up_inner"], act, stride, experts["kind"], experts["alpha"], experts["limit"],
        experts["up_offset"], experts["gated"], experts["up_bias"], experts["intermediate"],
        experts["down_format"], active, ids, first, rows, h, experts["h_stride"],
        experts["threads"], buf,
    )  # fmt: skip


@kernel()
def _down(experts, counter, active, ids, first, order, pairs, top_k, weights, h, x, buf):
    """Add the experts' weighted output to the hidden states; returns when all items are done."""
    blocks = bytes_at(experts["at"], experts["count"] * experts["stride"])
    items = down_items(
        counter, experts["down_format"], blocks, experts["stride"], experts["section"],
        experts["down_strip"], experts["down_inner"], h, experts["h_stride"],
        experts["down_bias"], active, ids, first, order, pairs, top_k, weights,
        experts["strips"], experts["threads"], x, buf,
    )  # fmt: skip
    wait_for(counter, np.int64(3), items)


@kernel()
def _feed_forward(layer, counter, spent, since, work, count, w):
    """Router, experts and shared experts, or a dense layer; returns when it ended.

    ``spent`` gets the ticks from ``since`` on.
    """
    router, experts, shared = layer["router"], layer["experts"], layer["shared"]
    matrix, top_k, buf, order = router["matrix"], router["top_k"], work.my_buf[w], work.order
    formats = (matrix["format"], experts["format"], shared["format"])
    normalize_tokens(
        counter, FFN_NORM, layer["ffn_norm"], formats, work.x, order, count, work.normed, work.acts
    )
    active = _ZERO
    if top_k:
        act, stride = given(formats, matrix["format"], work.normed, work.acts)
        multiply_all(
            counter, ROUTE, matrix, act, stride, order, count, buf, np.float32(1), False,
            work.scores,
        )  # fmt: skip
        active = _choose(layer, counter, work, count, w)
        since = spend(spent, ATTENTION, since, w)
        act, stride = given(formats, experts["format"], work.normed, work.acts)
        _up(
            experts, counter[EXPERTS:], act, stride, active, work.experts, work.first, work.rows,
            work.h, buf,
        )  # fmt: skip
        since = spend(spent, ROUTED, since, w)
    else:
        _share_alike(layer, counter, work, count)
    if shared["count"]:
        act, stride = given(formats, shared["format"], work.normed, work.acts)
        _up(
            shared, counter[SHARED:], act, stride, _ONE, work.zeros, work.everyone, order,
            work.h_shared, buf,
        )  # fmt: skip
        since = spend(spent, DENSE, since, w)
    if top_k:
        _down(
            experts, counter[EXPERTS:], active, work.experts, work.first, order, work.pairs, top_k,
            work.weights, work.h, work.x, buf,
        )  # fmt: skip
        since = spend(spent, ROUTED, since, w)
    if shared["count"]:
        _down(
            shared, counter[SHARED:], _ONE, work.zeros, work.everyone, order, order, _ONE,
            work.shares, work.h_shared, work.x, buf,
        )  # fmt: skip
        since = spend(spent, DENSE, since, w)
    return since


@kernel()
def _walk(layers, states, head, cos, sin, paired, work, count, texts, owners, kept, logits, w):
    since = ticks()
    for i in range(layers.size):
        counter, spent = work.counters[i], work.spent[i]
        of_layer = states[:, i]
        _attention(layers[i], of_layer, counter, cos, sin, paired, work, count, texts, owners, w)
        since = spend(spent, ATTENTION, since, w)
        since = _feed_forward(layers[i], counter, spent, since, work, count, w)
    if kept.size == 0:
        return
    last, counter = head[0], work.counters[layers.size]
    matrix, scale = last["matrix"], last["scale"] * np.float32(1)
    formats = (matrix["format"], _ZERO, _ZERO)
    normalize_tokens(
        counter, NORM, last["norm"], formats, work.x, kept, kept.size, work.normed, work.acts
    )
    act, stride = given(formats, matrix["format"], work.normed, work.acts)
    multiply_all(
        counter, OUTPUT, matrix, act, stride, work.order, kept.size, work.my_buf[w], scale, False,
        logits,
    )  # fmt: skip
    spend(work.spent[layers.size], ATTENTION, since, w)


@kernel(parallel=True)
def decode_tokens(
    layers, states, head, cos, sin, paired, work, count, texts, owners, kept, logits, threads
):  # fmt: skip
    """Move ``work.x[:count]``, embedded tokens, through all layers; write the logits of ``kept``.

    ``states`` are ``[rows, layers]``, ``texts`` :data:`~cpu_experts.decoder.records.TEXT`, of which
    ``owners`` ``[count]`` has each token's. ``cos`` and ``sin`` are ``[count, pairs]``, ``logits``
    ``[kept, V]``. Keys and values are written behind the ``length`` positions of each state.
    """
    work.counters[:] = 0
    work.everyone[1] = count
    for w in prange(threads):
        _walk(
            layers, states, head, cos, sin, paired, work, count, texts, owners, kept, logits,
            np.int64(w),
        )  # fmt: skip
