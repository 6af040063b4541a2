"""The parts of a decoder layer for one token: norms, projections, attention, the router.

Compiled loops that neither allocate nor validate. What every thread needs (a normed token,
the router's choice) every thread computes for itself, because that is cheaper than waiting
for another to do it; what is large is cut into items that threads take off a counter. A
counter is two numbers: items taken and items done.

Keys lie in strips of 16 positions ``[kv_heads, capacity / 16, head_dim, 16]``, values in
strips of 16 dimensions ``[kv_heads, head_dim / 16, capacity, 16]``: both are float32 matrices
as :mod:`cpu_experts.formats` lays them out, so that attention is the same two micro-kernel
products as everything else.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np
from numba import config

from cpu_experts import simd
from cpu_experts.addresses import bytes_at, floats_at
from cpu_experts.compiled import kernel
from cpu_experts.formats import ACT_GROUP, GROUP, TILE
from cpu_experts.kernels import F32, Q8_0, dot_rows, fetch_add, quantize_group
from cpu_experts.tables import SIGMOID, SOFTMAX_OF_CHOSEN, SPARSEMIXER

if simd.LEVEL == "portable" or config.DISABLE_JIT:
    from cpu_experts.portable import exp_strip
else:
    from cpu_experts.simd_dense import exp_strip

#: Positions that one item of attention looks at.
CHUNK = 256
#: Arguments of one type: numba compiles a function anew for every number written out in a call.
_ZERO, _ONE, _FLOATS = np.int64(0), np.int64(1), np.int64(F32)


@kernel(reassociate=True)
def normalize(norm, x, x_at, out, out_at):
    """Write the norm of ``x[x_at : x_at + size]`` to ``out[out_at:]``."""
    size = norm["size"]
    mean = np.float32(0)
    if norm["centered"]:
        total = np.float32(0)
        for i in range(size):
            total += x[x_at + i]
        mean = total / np.float32(size)
    squares = np.float32(0)
    for i in range(size):
        squares += (x[x_at + i] - mean) * (x[x_at + i] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(size) + norm["eps"])
    weight = floats_at(norm["weight"], size)
    for i in range(size):
        out[out_at + i] = (x[x_at + i] - mean) * scale * weight[i]
    if norm["bias"]:
        bias = floats_at(norm["bias"], size)
        for i in range(size):
            out[out_at + i] += bias[i]


@kernel()
def activate(fmt, offset, x, cols, act):
    """Return ``x[:cols]`` as the micro-kernels of a format take it, quantized into ``act``.

    ``x`` has room for whole groups; what is behind ``cols`` becomes zero.
    """
    if fmt > Q8_0:
        return x.view(np.uint8)
    groups = -(-cols // GROUP)
    for i in range(cols, groups * GROUP):
        x[i] = 0
    for g in range(groups):
        quantize_group(x, g * GROUP, offset, act, g * ACT_GROUP)
    return act


@kernel()
def multiply_strips(matrix, first, last, act, rows, buf, scale, add, out, out_at):
    """Write (or add) ``scale * (matrix @ act + bias)`` for the strips ``first : last``."""
    if last <= first:
        return
    size, count = matrix["strip_bytes"], matrix["rows"]
    weights = bytes_at(matrix["at"], -(-count // TILE) * size)
    bias = floats_at(matrix["bias"], count)
    for s in range(first, last):
        dot_rows(
            matrix["format"],
            weights,
            s * size,
            act,
            _ZERO,
            rows,
            _ZERO,
            _ONE,
            matrix["inner"],
            buf,
            _ZERO,
        )
        columns = min(TILE, count - s * TILE)
        if matrix["bias"]:
            for i in range(columns):
                buf[i] += bias[s * TILE + i]
        at = out_at + s * TILE
        if add:
            for i in range(columns):
                out[at + i] += scale * buf[i]
        else:
            for i in range(columns):
                out[at + i] = scale * buf[i]


@kernel()
def multiply_items(counter, at, matrix, act, rows, buf, scale, add, out):
    """Take items of a matrix product off ``counter[at]``; return how many there are."""
    strips = -(-matrix["rows"] // TILE)
    step = matrix["strips"]
    while True:
        first = fetch_add(counter, at) * step
        if first >= strips:
            break
        last = min(first + step, strips)
        multiply_strips(matrix, first, last, act, rows, buf, scale, add, out, _ZERO)
        fetch_add(counter, at + 1)
    return -(-strips // step)


@kernel()
def project_items(counter, at, layer, act, rows, buf, qkv):
    """Take items of the three projections in front of attention; return how many there are."""
    q, k, v = layer["q"], layer["k"], layer["v"]
    in_q, in_k, in_v = -(-q["rows"] // TILE), -(-k["rows"] // TILE), -(-v["rows"] // TILE)
    strips, step = in_q + in_k + in_v, q["strips"]
    one = np.float32(1)
    while True:
        first = fetch_add(counter, at) * step
        if first >= strips:
            break
        last = min(first + step, strips)
        multiply_strips(q, first, min(last, in_q), act, rows, buf, one, False, qkv, _ZERO)
        first, last = max(first - in_q, 0), last - in_q
        multiply_strips(k, first, min(last, in_k), act, rows, buf, one, False, qkv, q["rows"])
        first, last = max(first - in_k, 0), last - in_k
        behind = q["rows"] + k["rows"]
        multiply_strips(v, first, last, act, rows, buf, one, False, qkv, behind)
        fetch_add(counter, at + 1)
    return -(-strips // step)


@kernel()
def rotate(x, at, cos, sin, paired):
    """Turn the first ``2 * cos.size`` numbers of a head; ``paired`` turns neighbours."""
    half = cos.size
    for i in range(half):
        a, b = (at + 2 * i, at + 2 * i + 1) if paired else (at + i, at + half + i)
        left, right = x[a], x[b]
        x[a] = left * cos[i] - right * sin[i]
        x[b] = right * cos[i] + left * sin[i]


@kernel(reassociate=True)
def _prepare(norm, clip, source, start, size, head, dim, cos, sin, paired, out, out_at):
    """Norm, clip and turn one head of ``source[start : start + size]`` into ``out[out_at:]``."""
    base = start + head * dim
    for i in range(dim):
        out[out_at + i] = source[base + i]
    if norm["size"] == dim:
        normalize(norm, source, base, out, out_at)
    elif norm["size"]:  # over all heads together
        squares = np.float32(0)
        for i in range(size):
            squares += source[start + i] * source[start + i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + norm["eps"])
        weight = floats_at(norm["weight"], size)
        for i in range(dim):
            out[out_at + i] *= scale * weight[head * dim + i]
    if clip < np.inf:
        for i in range(dim):
            out[out_at + i] = min(max(out[out_at + i], -clip), clip)
    rotate(out, out_at, cos, sin, paired)


@kernel()
def _append(layer, state, head, qkv, cos, sin, paired, key):
    """Write one head's key and value of the new token into the cache."""
    dim, slot, capacity = layer["head_dim"], state["length"], state["capacity"]
    strips = -(-dim // TILE)
    keys = floats_at(state["keys"], layer["kv_heads"] * capacity * dim)
    values = floats_at(state["values"], layer["kv_heads"] * strips * capacity * TILE)
    q_size, k_size, clip = layer["q"]["rows"], layer["k"]["rows"], layer["clip"]
    _prepare(layer["k_norm"], clip, qkv, q_size, k_size, head, dim, cos, sin, paired, key, _ZERO)
    strip = (head * (capacity // TILE) + slot // TILE) * dim
    value_at = q_size + k_size + head * dim
    for i in range(dim):
        keys[(strip + i) * TILE + slot % TILE] = key[i]
        value = min(max(qkv[value_at + i], -clip), clip)
        values[((head * strips + i // TILE) * capacity + slot) * TILE + i % TILE] = value


@kernel(reassociate=True)
def _weigh(scores, at, first, last, count):
    """Turn scores into ``exp(score - largest)``, zero outside ``first : last``.

    Returns the largest score and the sum of the weights.
    """
    largest = np.float32(-np.inf)
    for i in range(first, last):
        largest = max(largest, scores[at + i])
    for i in range(0, count, TILE):
        exp_strip(scores, at + i, largest)
    for i in range(first):
        scores[at + i] = 0
    for i in range(last, count):
        scores[at + i] = 0
    total = np.float32(0)
    for i in range(first, last):
        total += scores[at + i]
    return largest, total


@kernel()
def _attend(layer, state, head, chunk, queries, scores, rows, buf, parts, part_at, stats):
    """One chunk of positions for the query heads of one key-value head.

    Writes their weighted sums of values to ``parts[part_at + t]`` and largest score and sum of
    weights to ``stats``, unnormalised.
    """
    dim, capacity = layer["head_dim"], state["capacity"]
    many = layer["heads"] // layer["kv_heads"]
    stop = min(state["length"] + 1, (chunk + 1) * CHUNK)
    start = chunk * CHUNK
    if layer["window"]:
        start = max(start, state["length"] + 1 - layer["window"])
    base = start // TILE * TILE
    strips = -(-dim // TILE)
    keys = bytes_at(state["keys"], 4 * layer["kv_heads"] * capacity * dim)
    values = bytes_at(state["values"], 4 * layer["kv_heads"] * strips * capacity * TILE)
    act = queries.view(np.uint8)
    for p in range(base, stop, TILE):
        at = 4 * (head * capacity + p) * dim
        dot_rows(_FLOATS, keys, at, act, 4 * dim, rows, _ZERO, many, dim, buf, _ZERO)
        for t in range(many):
            for i in range(TILE):
                scores[t * CHUNK + p - base + i] = buf[t * TILE + i]
    count = -(-(stop - base) // TILE) * TILE
    for t in range(many):
        largest, total = _weigh(scores, t * CHUNK, start - base, stop - base, count)
        stats[part_at + t, 0] = largest
        stats[part_at + t, 1] = total
    act = scores.view(np.uint8)
    for s in range(strips):
        at = 4 * ((head * strips + s) * capacity + base) * TILE
        dot_rows(
            _FLOATS,
            values,
            at,
            act,
            np.int64(4 * CHUNK),
            rows,
            _ZERO,
            many,
            stop - base,
            buf,
            _ZERO,
        )
        for t in range(many):
            for i in range(min(TILE, dim - s * TILE)):
                parts[part_at + t, s * TILE + i] = buf[t * TILE + i]


@kernel()
def _merge(layer, head, chunks, parts, stats, attended):
    """Add up the chunks of the query heads of one key-value head."""
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
        for i in range(dim):
            attended[query_head * dim + i] = 0
        for c in range(chunks):
            part = first + c * many
            weight = np.exp(stats[part, 0] - largest)
            total += weight * stats[part, 1]
            for i in range(dim):
                attended[query_head * dim + i] += weight * parts[part, i]
        for i in range(dim):
            attended[query_head * dim + i] /= total


@kernel()
def attention_items(
    counter, at, layer, state, qkv, cos, sin, paired, queries, scores, key, rows, buf,
    parts, stats, attended,
):  # fmt: skip
    """Take (key-value head, chunk) items; whoever ends a head's last chunk merges the head.

    Returns how many heads there are to wait for. ``counter[at + 2 + head]`` counts chunks.
    """
    dim = layer["head_dim"]
    many = layer["heads"] // layer["kv_heads"]
    first_chunk = 0
    if layer["window"]:
        first_chunk = max(0, state["length"] + 1 - layer["window"]) // CHUNK
    chunks = state["length"] // CHUNK + 1 - first_chunk
    while True:
        item = fetch_add(counter, at)
        if item >= layer["kv_heads"] * chunks:
            break
        head, chunk = item // chunks, item % chunks
        if chunk == chunks - 1:
            _append(layer, state, head, qkv, cos, sin, paired, key)
        for t in range(many):
            _prepare(
                layer["q_norm"], layer["clip"], qkv, _ZERO, layer["q"]["rows"], head * many + t,
                dim, cos, sin, paired, queries, t * dim,
            )  # fmt: skip
        for i in range(many * dim):
            queries[i] *= layer["scaling"]
        part_at = (head * chunks + chunk) * many
        _attend(
            layer, state, head, first_chunk + chunk, queries, scores, rows, buf,
            parts, part_at, stats,
        )  # fmt: skip
        if fetch_add(counter, at + 2 + head) == chunks - 1:
            _merge(layer, head, chunks, parts, stats, attended)
            fetch_add(counter, at + 1)
    return layer["kv_heads"]


@kernel()
def _best(choice, count):
    best = 0
    for i in range(1, count):
        if choice[i] > choice[best]:
            best = i
    return best


@kernel()
def _softmax(x, count, out):
    largest = x[0]
    for i in range(1, count):
        largest = max(largest, x[i])
    total = np.float32(0)
    for i in range(count):
        out[i] = np.exp(x[i] - largest)
        total += out[i]
    for i in range(count):
        out[i] /= total


@kernel()
def _keep_best_groups(router, choice, of_groups):
    """Bar all groups of experts but those with the largest sums of their two best."""
    groups, size = router["groups"], router["experts"] // router["groups"]
    for g in range(groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for i in range(g * size, (g + 1) * size):
            if choice[i] > first:
                first, second = choice[i], first
            elif choice[i] > second:
                second = choice[i]
        of_groups[g] = first + second
    for _ in range(groups - router["top_groups"]):
        worst = 0
        for g in range(groups):
            if not of_groups[g] > of_groups[worst]:
                worst = g
        of_groups[worst] = np.inf
        for i in range(worst * size, (worst + 1) * size):
            choice[i] = -np.inf


@kernel()
def _mix_sparsely(router, logits, ids, weights, choice):
    """Two experts, each weighed among those of nearly its score (SparseMixer, 2409.12136)."""
    experts = router["experts"]
    for i in range(experts):
        choice[i] = logits[i]
    for pick in range(2):
        best = _best(choice, experts)
        top = choice[best]
        total = np.float32(0)
        for i in range(experts):
            near = (top - logits[i]) / max(abs(logits[i]), top) <= 2 * router["jitter"]
            if near and choice[i] > -np.inf:
                total += np.exp(choice[i] - top)
        ids[pick] = best
        weights[pick] = np.float32(1) / total
        choice[best] = -np.inf


@kernel()
def route(router, logits, ids, weights, scores, choice):
    """Write the router's choice to ``ids`` and ``weights``; the other two are scratch."""
    experts, top_k = router["experts"], router["top_k"]
    if router["scoring"] == SPARSEMIXER:
        _mix_sparsely(router, logits, ids, weights, choice)
        return
    if router["scoring"] == SIGMOID:
        for i in range(experts):
            scores[i] = np.float32(1) / (np.float32(1) + np.exp(-logits[i]))
    elif router["scoring"] == SOFTMAX_OF_CHOSEN:
        for i in range(experts):
            scores[i] = logits[i]
    else:
        _softmax(logits, experts, scores)
    for i in range(experts):
        choice[i] = scores[i]
    if router["correction"]:
        correction = floats_at(router["correction"], experts)
        for i in range(experts):
            choice[i] += correction[i]
    if router["groups"] > 1:
        _keep_best_groups(router, choice, weights)
    for k in range(top_k):
        ids[k] = _best(choice, experts)
        weights[k] = scores[ids[k]]
        choice[ids[k]] = -np.inf
    if router["scoring"] == SOFTMAX_OF_CHOSEN:
        _softmax(weights, top_k, weights)
    if router["normalize"]:
        total = np.float32(0)
        for k in range(top_k):
            total += weights[k]
        for k in range(top_k):
            weights[k] /= max(total, router["floor"])
    for k in range(top_k):
        weights[k] *= router["scale"]
