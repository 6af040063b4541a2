"""The parts of a decoder layer for one token: norms, projections, the router.

Compiled loops that neither allocate nor validate. What every thread needs (a normed token,
the router's choice) every thread computes for itself, because that is cheaper than waiting
for another to do it; what is large is cut into items that threads take off a counter. A
counter is two numbers: items taken and items done. Attention has its own file,
:mod:`cpu_experts.decoder.attention`.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np

from cpu_experts.decoder.records import SIGMOID, SOFTMAX_OF_CHOSEN, SPARSEMIXER
from cpu_experts.jit.addresses import bytes_at, floats_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.dots import is_quantized, sums_for
from cpu_experts.kernels.experts import dot_rows
from cpu_experts.kernels.micro import fetch_add, quantize_group
from cpu_experts.kernels.shares import share, shares
from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.groups import GROUPS
from hybrid.formats.strips import GROUP, SUPER, TILE

#: Arguments of one type: numba compiles a function anew for every number written out in a call.
_ZERO, _ONE = np.int64(0), np.int64(1)


@kernel(reassociate=True)
def normalize(norm, x, out):
    """Write the norm of ``x[:size]`` to ``out``."""
    size = norm["size"]
    mean = np.float32(0)
    if norm["centered"]:
        total = np.float32(0)
        for i in range(size):
            total += x[i]
        mean = total / np.float32(size)
    squares = np.float32(0)
    for i in range(size):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(size) + norm["eps"])
    weight = floats_at(norm["weight"], size)
    for i in range(size):
        out[i] = (x[i] - mean) * scale * weight[i]
    if norm["bias"]:
        bias = floats_at(norm["bias"], size)
        for i in range(size):
            out[i] += bias[i]


@kernel()
def activate(fmt, x, cols, act):
    """Return ``x[:cols]`` as the micro-kernels of a format take it, quantized into ``act``.

    ``x`` has room for whole groups, ``act`` for whole super-blocks; what is behind ``cols`` becomes
    zero.
    """
    if not is_quantized(fmt):
        return x.view(np.uint8)
    groups = -(-cols // GROUP)
    x[cols : groups * GROUP] = 0
    sums = sums_for(fmt)
    for g in range(groups):
        quantize_group(x, g * GROUP, sums, act, g * ACT_GROUP)
    act[groups * ACT_GROUP : -(-cols // SUPER) * GROUPS * ACT_GROUP] = 0
    return act


@kernel()
def multiply_strips(matrix, first, last, then, act, rows, buf, scale, add, out, out_at):
    """Write (or add) ``scale * (matrix @ act + bias)`` for the strips ``first : last``.

    The strip ``then`` is what is read next.
    """
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
            (s + 1 if s + 1 < last else then) * size,
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
            behind = bias[s * TILE :]
            for i in range(columns):
                buf[i] += behind[i]
        part = out[out_at + s * TILE :]
        if add:
            for i in range(columns):
                part[i] += scale * buf[i]
        else:
            for i in range(columns):
                part[i] = scale * buf[i]


@kernel()
def multiply_items(counter, at, matrix, act, rows, buf, scale, add, out):
    """Take items of a matrix product off ``counter[at]``; return how many there are."""
    strips, least, threads = -(-matrix["rows"] // TILE), matrix["strips"], matrix["threads"]
    first, last = share(fetch_add(counter, at), strips, least, threads)
    while first < strips:
        following, end = share(fetch_add(counter, at), strips, least, threads)
        then = following if following < strips else first
        multiply_strips(matrix, first, last, then, act, rows, buf, scale, add, out, _ZERO)
        fetch_add(counter, at + 1)
        first, last = following, end
    return shares(strips, least, threads)


@kernel()
def project_items(counter, at, layer, normed, memory, rows, buf, qkv):
    """Take items of the three projections in front of attention; return how many there are.

    Each finds ``normed`` as its format takes it, in ``memory``, made anew where that changes.
    """
    q, k, v = layer["q"], layer["k"], layer["v"]
    in_q, in_k, in_v = -(-q["rows"] // TILE), -(-k["rows"] // TILE), -(-v["rows"] // TILE)
    strips, least, threads = in_q + in_k + in_v, q["strips"], q["threads"]
    one, made = np.float32(1), q["format"]
    act = activate(made, normed, q["cols"], memory)
    while True:
        first, last = share(fetch_add(counter, at), strips, least, threads)
        if first >= strips:
            break
        here = min(last, in_q)
        if here > first and made != q["format"]:
            made = q["format"]
            act = activate(made, normed, q["cols"], memory)
        multiply_strips(q, first, here, first, act, rows, buf, one, False, qkv, _ZERO)
        first, last = max(first - in_q, 0), last - in_q
        here, behind = min(last, in_k), q["rows"]
        if here > first and made != k["format"]:
            made = k["format"]
            act = activate(made, normed, k["cols"], memory)
        multiply_strips(k, first, here, first, act, rows, buf, one, False, qkv, behind)
        first, last = max(first - in_k, 0), last - in_k
        behind += k["rows"]
        if last > first and made != v["format"]:
            made = v["format"]
            act = activate(made, normed, v["cols"], memory)
        multiply_strips(v, first, last, first, act, rows, buf, one, False, qkv, behind)
        fetch_add(counter, at + 1)
    return shares(strips, least, threads)


@kernel()
def rotate(x, cos, sin, paired):
    """Turn the first ``2 * cos.size`` numbers of a head; ``paired`` turns neighbours."""
    half = cos.size
    if paired:
        for i in range(half):
            left, right = x[2 * i], x[2 * i + 1]
            x[2 * i] = left * cos[i] - right * sin[i]
            x[2 * i + 1] = right * cos[i] + left * sin[i]
        return
    ahead = x[half:]
    for i in range(half):
        left, right = x[i], ahead[i]
        x[i] = left * cos[i] - right * sin[i]
        ahead[i] = right * cos[i] + left * sin[i]


@kernel()
def open_gate(gate, x, size):
    """Multiply ``x[:size]`` with the sigmoid of ``gate``."""
    for i in range(size):
        x[i] /= np.float32(1) + np.exp(-gate[i])


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
    """Bar all groups of experts but those whose best, or two best, are worth the most."""
    groups, size = router["groups"], router["experts"] // router["groups"]
    for g in range(groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for i in range(g * size, (g + 1) * size):
            if choice[i] > first:
                first, second = choice[i], first
            elif choice[i] > second:
                second = choice[i]
        of_groups[g] = first + second if router["of_group"] > 1 else first
    for _ in range(groups - router["top_groups"]):
        worst = 0
        for g in range(groups):
            if not of_groups[g] > of_groups[worst]:
                worst = g
        of_groups[worst] = np.inf
        choice[worst * size : (worst + 1) * size] = -np.inf


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
