"""The compiled loops around the micro-kernels: they neither allocate nor validate.

All of them see the router's choice as pairs of a token and an expert, sorted by expert:
expert ``experts[i]`` has the pairs ``first[i] : first[i + 1]``. A region is one fork and
join; inside it each thread takes the next item off a shared counter until none is left, so
that threads finish together whatever slows one of them down. It takes an item while it is still
at the one before, so that the end of that prefetches the beginning of this.

Inner loops count from 0 over a slice, ``part = x[at:]`` and ``part[i]``: in ``x[at + i]`` an index
may be negative and mean the end, so LLVM does not see that neighbours lie side by side, and
gathers them with AVX-512, which can take several times longer.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import math

import numpy as np
from numba import prange

from cpu_experts.jit.addresses import bytes_at, floats_at, words_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.dots import SIZE, dot, is_quantized, sums_for
from cpu_experts.kernels.micro import (
    ROW_BLOCKS,
    add_strip,
    copy_strip,
    fetch_add,
    multiply_strip,
    quantize_group,
    silu_strip,
    wait_for,
)
from cpu_experts.kernels.shares import share, shares
from hybrid.formats.activations import ACT_GROUP
from hybrid.formats.block import ACTIVATIONS
from hybrid.formats.strips import GROUP, TILE

SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID = (
    ACTIVATIONS.index(name) for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")
)
WIDE, MIDDLE, _ = ROW_BLOCKS
_ONE = np.int64(1)
#: Tokens an expert, on average, from which on experts are shared out in the smallest items.
_FEW = np.int64(4)
#: Activation rows that meet a strip before the next strip does: a strip stays in the nearest
#: cache meanwhile, the rows in the one behind it. A multiple of every ``WIDE``.
ROWS = 48
#: Float32 of scratch a thread needs: four strips of gate and up, then one group of h, by row.
SCRATCH = ROWS * (4 * TILE + GROUP)
#: Scratch rows of two threads lie whole cache lines apart.
SCRATCH_WIDTH = SCRATCH + 16
#: What :func:`run_routed` works in, in the order of their addresses.
BUFFERS = ("activations", "experts", "first", "pairs", "rows", "order", "h", "counter", "scratch")


@kernel()
def dot_rows(fmt, w, w_at, then_at, act, stride, rows, first, count, inner, out, out_at):
    """Multiply one strip with ``count`` activation rows into ``out`` ``[count, 16]``.

    ``fmt`` is the address of the format's table (:mod:`cpu_experts.kernels.dots`). The strip that
    is read next begins at byte ``then_at``.
    """
    table = words_at(fmt, SIZE)
    t = np.int64(0)
    while t < count:
        o = out_at + TILE * t
        r = first + t
        if count - t >= WIDE:
            dot(table[0], w, w_at, then_at, act, stride, rows, r, inner, out, o)
            t += WIDE
        elif count - t >= MIDDLE:
            dot(table[1], w, w_at, then_at, act, stride, rows, r, inner, out, o)
            t += MIDDLE
        else:
            dot(table[2], w, w_at, then_at, act, stride, rows, r, inner, out, o)
            t += 1


@kernel()
def sort_pairs(ids, num_experts, experts, first, pairs):
    """Sort the flat ids by expert; return how many experts have pairs.

    ``pairs`` receives the flat positions, ``experts`` and ``first`` their runs; ids outside
    ``[0, num_experts)`` are dropped. ``first`` ``[num_experts + 1]`` doubles as the counters.
    """
    first[:] = 0
    for p in range(ids.size):
        if 0 <= ids[p] < num_experts:
            first[ids[p] + 1] += 1
    for e in range(num_experts):
        first[e + 1] += first[e]
    for p in range(ids.size):
        if 0 <= ids[p] < num_experts:
            pairs[first[ids[p]]] = p
            first[ids[p]] += 1
    # first[e] is now the end of run e: close the gaps of the experts without pairs.
    active, start = 0, 0
    for e in range(num_experts):
        end = first[e]
        if end > start:
            experts[active] = e
            first[active] = start
            active += 1
            start = end
    first[active] = start
    return active


@kernel()
def _quantize_row(x, row, cols, sums, tail, act, stride):
    """Quantize ``x[row, :cols]`` into activation row ``row``; ``tail`` is 32 floats of scratch.

    What is behind them becomes zero, up to a whole super-block.
    """
    flat = x.reshape(-1)
    whole = cols // GROUP
    for g in range(whole):
        quantize_group(flat, row * cols + g * GROUP, sums, act, row * stride + g * ACT_GROUP)
    if whole * GROUP < cols:
        tail[:GROUP] = 0
        rest = x[row, whole * GROUP :]
        for k in range(cols - whole * GROUP):
            tail[k] = rest[k]
        quantize_group(tail, 0, sums, act, row * stride + whole * ACT_GROUP)
        whole += 1
    act[row * stride + whole * ACT_GROUP : (row + 1) * stride] = 0


@kernel(parallel=True)
def quantize_rows(x, fmt, scratch, act, stride, threads):
    """Quantize the rows of ``x`` ``[T, K]`` into activation rows of ``stride`` bytes."""
    tokens, cols = x.shape
    sums = sums_for(fmt)
    if tokens * cols < 65536:
        for t in range(tokens):
            _quantize_row(x, t, cols, sums, scratch[0], act, stride)
    else:
        for w in prange(threads):
            for t in range(w * tokens // threads, (w + 1) * tokens // threads):
                _quantize_row(x, t, cols, sums, scratch[w], act, stride)


@kernel()
def activate(kind, alpha, limit, up_offset, gated, buf, gate_at, up_at, out_at):
    """Write ``act(gate) * up`` (or ``act(up)``) of 16 rows to ``buf[out_at:]``."""
    if gated and limit < np.inf:
        for i in range(TILE):
            buf[gate_at + i] = min(buf[gate_at + i], limit)
    if limit < np.inf:
        for i in range(TILE):
            buf[up_at + i] = max(min(buf[up_at + i], limit), -limit)
    source = gate_at if gated else up_at
    if kind == SILU:
        silu_strip(buf, source, alpha, buf, out_at)
    else:
        for i in range(TILE):
            v = buf[source + i]
            if kind == GELU:
                v = (
                    np.float32(0.5)
                    * v
                    * np.float32(1 + math.erf(v * np.float32(0.7071067811865476)))
                )
            elif kind == GELU_TANH:
                inner = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
                v = np.float32(0.5) * v * (np.float32(1) + math.tanh(inner))
            elif kind == RELU:
                v = max(v, np.float32(0))
            elif kind == RELU2:
                v = max(v, np.float32(0))
                v = v * v
            elif kind == SIGMOID:
                v = np.float32(1) / (np.float32(1) + math.exp(-v))
            buf[out_at + i] = v
    if gated:
        multiply_strip(buf, out_at, buf, up_at, up_offset)


@kernel()
def _up_item(
    fmt, blocks, base, at_item, after, strip, inner, act, act_stride, kind, alpha, limit,
    up_offset, gated, bias_at, intermediate, down_fmt, begin, end, group, rows, h, h_stride, buf,
):  # fmt: skip
    """32 rows of h of one expert's pairs ``begin : end``; ``after`` is where reading goes on."""
    sums, quantized = sums_for(down_fmt), is_quantized(down_fmt)
    sides = 2 if gated else 1
    floats, flat_h, h_at = blocks.view(np.float32), h.view(np.float32), 4 * TILE * ROWS
    width = min(GROUP, intermediate - group * GROUP)
    for p in range(begin, end, ROWS):
        count = min(ROWS, end - p)
        for s in range(2 * sides):
            at = at_item + s * strip
            then = at + strip if s + 1 < 2 * sides else after
            out_at = s * TILE * ROWS
            dot_rows(fmt, blocks, at, then, act, act_stride, rows, p, count, inner, buf, out_at)
            if bias_at >= 0:
                bias = (base + bias_at) // 4 + (2 * sides * group + s) * TILE
                for t in range(count):
                    add_strip(floats, bias, np.float32(1), buf, (s * ROWS + t) * TILE)
        for t in range(count):
            for half in range(2):
                gate = (half * sides * ROWS + t) * TILE
                up = ((half * sides + sides - 1) * ROWS + t) * TILE
                out = h_at + t * GROUP + half * TILE
                activate(kind, alpha, limit, up_offset, gated, buf, gate, up, out)
            own = h_at + t * GROUP
            if quantized:
                if width < GROUP:
                    buf[own + width : own + GROUP] = 0
                at = (p + t) * h_stride + group * ACT_GROUP
                quantize_group(buf, own, sums, h, at)
                if (group + 1) * GROUP >= intermediate:
                    h[at + ACT_GROUP : (p + t + 1) * h_stride] = 0
            else:
                at = (p + t) * intermediate + group * GROUP
                source, target = buf[own:], flat_h[at:]
                for i in range(width):
                    target[i] = source[i]


@kernel()
def up_items(
    counter, fmt, blocks, block_stride, strip, inner, act, act_stride,
    kind, alpha, limit, up_offset, gated, bias_at, intermediate, down_fmt,
    active, experts, first, rows, h, h_stride, threads, buf,
):  # fmt: skip
    """Take (expert, 32 rows of h) items: gate and up, activation, quantize h for ``down_fmt``.

    ``threads`` share them out, one by one where some experts may have many more tokens than
    others.
    """
    per_expert = -(-intermediate // GROUP)
    items, item_bytes = active * per_expert, (4 if gated else 2) * strip
    takers = threads if active == 1 or first[active] < _FEW * active else items
    begin, end = share(fetch_add(counter, 0), items, _ONE, takers)
    while begin < items:
        following, behind = share(fetch_add(counter, 0), items, _ONE, takers)
        for item in range(begin, end):
            run, group = item // per_expert, item % per_expert
            base = experts[run] * block_stride
            at = base + group * item_bytes
            coming, after = item + 1 if item + 1 < end else following, at
            if coming < items:
                after = experts[coming // per_expert] * block_stride
                after += coming % per_expert * item_bytes
            _up_item(
                fmt, blocks, base, at, after, strip, inner, act, act_stride, kind, alpha, limit,
                up_offset, gated, bias_at, intermediate, down_fmt, first[run], first[run + 1],
                group, rows, h, h_stride, buf,
            )  # fmt: skip
        fetch_add(counter, 2)
        begin, end = following, behind
    # Shares are taken and never given back, so whoever waits here waits for running threads only.
    wait_for(counter, 2, shares(items, _ONE, takers))


@kernel()
def down_items(
    counter, fmt, blocks, block_stride, section, strip, inner, h, h_stride,
    bias_at, active, experts, first, rows, pairs, top_k, weights, least, threads, out, buf,
):  # fmt: skip
    """Take blocks of output columns: every expert's share of them, weighted and summed.

    ``threads`` share the strips out, at least so many at a time. Returns how many shares there are.
    """
    hidden, flat = out.shape[1], out.reshape(-1)
    strips = -(-hidden // TILE)
    floats = blocks.view(np.float32)
    begin, end = share(fetch_add(counter, 1), strips, least, threads)
    while begin < strips:
        following, behind = share(fetch_add(counter, 1), strips, least, threads)
        for run in range(active):
            base = experts[run] * block_stride
            after = base + section + begin * strip
            if run + 1 < active:
                after = experts[run + 1] * block_stride + section + begin * strip
            elif following < strips:
                after = experts[0] * block_stride + section + following * strip
            for s in range(begin, end):
                at = base + section + s * strip
                then = at + strip if s + 1 < end else after
                columns = min(TILE, hidden - s * TILE)
                for p in range(first[run], first[run + 1], ROWS):
                    count = min(ROWS, first[run + 1] - p)
                    dot_rows(fmt, blocks, at, then, h, h_stride, rows, p, count, inner, buf, 0)
                    for t in range(count):
                        if bias_at >= 0:
                            own, bias = buf[t * TILE :], floats[(base + bias_at) // 4 + s * TILE :]
                            for i in range(columns):
                                own[i] += bias[i]
                        pair = pairs[p + t]
                        at_out, weight = pair // top_k * hidden + s * TILE, weights[pair]
                        if columns == TILE:
                            add_strip(buf, t * TILE, weight, flat, at_out)
                        else:
                            own, target = buf[t * TILE :], flat[at_out:]
                            for i in range(columns):
                                target[i] += weight * own[i]
        fetch_add(counter, 3)
        begin, end = following, behind
    return shares(strips, least, threads)


@kernel(parallel=True)
def run_pairs(
    fmt, blocks, block_stride, up_strip, up_inner, section, down_strip, down_inner,
    act, act_stride, kind, alpha, limit, up_offset, gated, up_bias, down_bias, intermediate,
    down_fmt, active, experts, first, pairs, rows, order, top_k, weights, h, h_stride,
    strips_an_item, counter, scratch, threads, out,
):  # fmt: skip
    """Add every pair's weighted expert output to ``out``: one region, up then down."""
    counter[:] = 0
    for p in range(first[active]):
        rows[p] = pairs[p] // top_k
        order[p] = p
    for w in prange(threads):
        up_items(
            counter, fmt, blocks, block_stride, up_strip, up_inner, act, act_stride,
            kind, alpha, limit, up_offset, gated, up_bias, intermediate, down_fmt,
            active, experts, first, rows, h, h_stride, threads, scratch[w],
        )  # fmt: skip
        down_items(
            counter, down_fmt, blocks, block_stride, section, down_strip, down_inner, h, h_stride,
            down_bias, active, experts, first, order, pairs, top_k, weights, strips_an_item,
            threads, out, scratch[w],
        )  # fmt: skip


@kernel()
def run_routed(table, x, ids, weights, work, act_stride, out, threads):
    """Add the routed experts' weighted output to ``out``.

    ``table`` has one record of ``cpu_experts.kernels.records.EXPERTS``; ``work`` are the addresses
    of :data:`BUFFERS`. One call does everything, because every argument of a compiled function
    and every call from Python takes its time.
    """
    e = table[0]
    pairs_all, tokens, top_k = ids.size, x.shape[0], ids.shape[1]
    blocks = bytes_at(e["at"], e["count"] * e["stride"])
    experts = bytes_at(work[1], 8 * (e["count"] + 1)).view(np.int64)
    first = bytes_at(work[2], 8 * (e["count"] + 1)).view(np.int64)
    pairs = bytes_at(work[3], 4 * pairs_all).view(np.int32)
    active = sort_pairs(ids.reshape(-1), e["count"], experts, first, pairs)
    if active == 0:
        return
    rows = bytes_at(work[4], 4 * pairs_all).view(np.int32)
    order = bytes_at(work[5], 4 * pairs_all).view(np.int32)
    h = bytes_at(work[6], -(-pairs_all * e["h_stride"] // 4) * 4)
    counter = bytes_at(work[7], 32).view(np.int64)
    scratch = floats_at(work[8], threads * SCRATCH_WIDTH).reshape(threads, SCRATCH_WIDTH)
    if is_quantized(e["format"]):
        act, stride = bytes_at(work[0], tokens * act_stride), act_stride
        quantize_rows(x, e["format"], scratch, act, stride, threads)
    else:
        act, stride = x.reshape(-1).view(np.uint8), 4 * x.shape[1]
    run_pairs(
        e["format"], blocks, e["stride"], e["up_strip"], e["up_inner"], e["section"],
        e["down_strip"], e["down_inner"], act, stride, e["kind"], e["alpha"], e["limit"],
        e["up_offset"], e["gated"], e["up_bias"], e["down_bias"], e["intermediate"],
        e["down_format"], active, experts, first, pairs, rows, order, top_k, weights.reshape(-1),
        h, e["h_stride"], e["strips"], counter, scratch, threads, out,
    )  # fmt: skip


@kernel()
def _project_items(
    counter, fmt, blocks, block_stride, section, strip, inner, act, act_stride,
    bias_at, active, experts, first, rows, targets, strips_an_item, out, buf,
):  # fmt: skip
    columns_all, flat = out.shape[1], out.reshape(-1)
    strips = -(-columns_all // TILE)
    per_expert = -(-strips // strips_an_item)
    floats = blocks.view(np.float32)
    while True:
        item = fetch_add(counter, 0)
        if item >= active * per_expert:
            break
        run, part = item // per_expert, item % per_expert
        base = experts[run] * block_stride
        for p in range(first[run], first[run + 1], ROWS):
            count = min(ROWS, first[run + 1] - p)
            for s in range(part * strips_an_item, min((part + 1) * strips_an_item, strips)):
                at = base + section + s * strip
                columns = min(TILE, columns_all - s * TILE)
                dot_rows(
                    fmt, blocks, at, at + strip, act, act_stride, rows, p, count, inner, buf, 0
                )
                for t in range(count):
                    at_out = targets[p + t] * columns_all + s * TILE
                    if columns == TILE:
                        copy_strip(buf, t * TILE, flat, at_out)
                    else:
                        own, target = buf[t * TILE :], flat[at_out:]
                        for i in range(columns):
                            target[i] = own[i]
                    if bias_at >= 0:
                        target, bias = flat[at_out:], floats[(base + bias_at) // 4 + s * TILE :]
                        for i in range(columns):
                            target[i] += bias[i]


@kernel(parallel=True)
def project_pairs(
    fmt, blocks, block_stride, section, strip, inner, act, act_stride, bias_at,
    active, experts, first, rows, targets, strips_an_item, counter, scratch, threads, out,
):  # fmt: skip
    """Write one matrix's product for every pair to ``out[targets[p]]``: one region.

    A dense layer is the case of a single expert that every token goes to.
    """
    counter[:] = 0
    for w in prange(threads):
        _project_items(
            counter, fmt, blocks, block_stride, section, strip, inner, act, act_stride,
            bias_at, active, experts, first, rows, targets, strips_an_item, out, scratch[w],
        )  # fmt: skip
