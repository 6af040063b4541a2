"""The loops around products of tiles: experts, and single matrices, of many tokens.

As in :mod:`cpu_experts.kernels.experts` threads take items off a shared counter. Here an item
widens some strips into tiles once, as many as its thread's own cache holds, and multiplies them
with all tokens of the expert, 32 at a time: what widening costs is shared by them.
Activations are bfloat16, in the order of the pairs, so that an expert's tokens lie side by side.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import numpy as np
from numba import prange

from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.experts import activate
from cpu_experts.kernels.micro import add_strip, copy_strip, fetch_add, wait_for
from cpu_experts.kernels.tiles import (
    TILE_BYTES,
    TOKENS,
    begin,
    end,
    expect_writes,
    fill,
    round_rows,
    tile_dot,
)
from hybrid.formats.strips import GROUP, TILE

#: Bytes of widened tiles that a thread works with: its own cache has them and a block of tokens.
TILES = 1 << 19
#: Tiles of a strip that are widened at a time for a single block of tokens.
STEPS = 8
#: The most strips that an item takes.
STRIPS = 8
#: Float32 that a thread sums up: a block of tokens times so many strips.
SUMS = TOKENS * STRIPS * TILE
#: Counters that a call takes.
COUNTERS = 5
_one, _two = tile_dot(1), tile_dot(2)


@kernel()
def _dot(act, at, stride, count, tiles, first, second, steps, sums, to, more):
    if count > TILE:
        _two(act, at, stride, tiles, first, second, steps, sums, to, more)
    else:
        _one(act, at, stride, tiles, first, second, steps, sums, to, more)


@kernel()
def _widen(filler, w, w_at, strip, strips, steps, tiles, count):
    """Widen strips for more tokens than one block, one strip after the other; else do nothing."""
    if count > TOKENS:
        for s in range(strips):
            fill(filler, w, w_at + s * strip, 0, steps, tiles, s * steps * TILE_BYTES)


@kernel()
def _multiply(filler, w, w_at, strip, strips, steps, act, act_at, stride, count, of, tiles, sums):
    """Write products of ``count`` rows, at most 32 and of ``of`` in all, with strips to ``sums``.

    Strips that all rows share are widened by now. For a single block they are widened here, some
    tiles at a time, which never leave the nearest cache. ``sums`` is ``[strips / 2, 32, 2, 16]``,
    flat; an odd strip at the end counts twice.
    """
    if of <= TOKENS:
        for s in range(0, strips, 2):
            for k in range(0, steps, STEPS):
                here, at = min(STEPS, steps - k), act_at + 2 * GROUP * k
                fill(filler, w, w_at + s * strip, k, here, tiles, 0)
                second = 0
                if s + 1 < strips:
                    second = STEPS * TILE_BYTES
                    fill(filler, w, w_at + (s + 1) * strip, k, here, tiles, second)
                to = s * TOKENS * TILE
                _dot(act, at, stride, count, tiles, 0, second, here, sums, to, k > 0)
    else:
        for k in range(0, steps, 2 * STEPS):
            here, at = min(2 * STEPS, steps - k), act_at + 2 * GROUP * k
            for s in range(0, strips, 2):
                first = (s * steps + k) * TILE_BYTES
                second = (min(s + 1, strips - 1) * steps + k) * TILE_BYTES
                to = s * TOKENS * TILE
                _dot(act, at, stride, count, tiles, first, second, here, sums, to, k > 0)


@kernel()
def _sum_at(token, s):
    """Where the sums of a token and a strip begin."""
    return ((s // 2 * TOKENS + token) * 2 + s % 2) * TILE


@kernel()
def _add_bias(bias, bias_at, count, strips, sums):
    """Add to the sums of ``count`` tokens."""
    for s in range(strips):
        part = bias[bias_at + s * TILE :]
        for t in range(count):
            own = sums[_sum_at(t, s) :]
            for i in range(TILE):
                own[i] += part[i]


@kernel()
def _up_items(
    counter, filler, blocks, block_stride, strip, steps, groups, act, act_stride, kind, alpha,
    limit, up_offset, gated, bias_at, intermediate, active, experts, first, h, h_stride, tiles,
    sums,
):  # fmt: skip
    """Take groups of intermediate columns: products, then the activation."""
    sides = 2 if gated else 1
    groups_all = -(-intermediate // GROUP)
    per_expert = -(-groups_all // groups)
    floats = blocks.view(np.float32)
    item = fetch_add(counter, 0)
    while item < active * per_expert:
        run, group = item // per_expert, item % per_expert * groups
        here = min(groups, groups_all - group)
        base, strips = experts[run] * block_stride, 2 * sides * here
        at, tokens = base + 2 * sides * group * strip, first[run + 1] - first[run]
        _widen(filler, blocks, at, strip, strips, steps, tiles, tokens)
        for p in range(first[run], first[run + 1], TOKENS):
            count = min(TOKENS, first[run + 1] - p)
            _multiply(
                filler, blocks, at, strip, strips, steps, act, p * act_stride, act_stride, count,
                tokens, tiles, sums,
            )  # fmt: skip
            if bias_at >= 0:
                own_bias = (base + bias_at) // 4 + 2 * sides * group * TILE
                _add_bias(floats, own_bias, count, strips, sums)
            for t in range(count):
                to = (p + t) * h_stride + 2 * group * GROUP
                for s in range(0, strips, sides):
                    gate, up = _sum_at(t, s), _sum_at(t, s + sides - 1)
                    activate(kind, alpha, limit, up_offset, gated, sums, gate, up, gate)
                    round_rows(sums, gate, TILE, h, to + 2 * TILE * (s // sides))
        fetch_add(counter, 2)
        item = fetch_add(counter, 0)
    # Items are taken and never given back, so whoever waits here waits for running threads only.
    wait_for(counter, 2, active * per_expert)


@kernel()
def _down_items(
    counter, filler, blocks, block_stride, section, strip, steps, strips_an_item, h, h_stride,
    bias_at, active, experts, first, pairs, top_k, weights, out, tiles, sums,
):  # fmt: skip
    """Take strips of output columns: every expert's share of them, weighted and summed."""
    hidden, flat = out.shape[1], out.reshape(-1)
    strips_all = -(-hidden // TILE)
    floats = blocks.view(np.float32)
    begins = fetch_add(counter, 1) * strips_an_item
    while begins < strips_all:
        strips = min(strips_an_item, strips_all - begins)
        for run in range(active):
            base = experts[run] * block_stride
            at, tokens = base + section + begins * strip, first[run + 1] - first[run]
            _widen(filler, blocks, at, strip, strips, steps, tiles, tokens)
            for p in range(first[run], first[run + 1], TOKENS):
                count = min(TOKENS, first[run + 1] - p)
                for t in range(count):
                    column = begins * TILE
                    width = min(strips * TILE, hidden - column)
                    expect_writes(flat, pairs[p + t] // top_k * hidden + column, width)
                _multiply(
                    filler, blocks, at, strip, strips, steps, h, p * h_stride, h_stride, count,
                    tokens, tiles, sums,
                )  # fmt: skip
                if bias_at >= 0:
                    _add_bias(floats, (base + bias_at) // 4 + begins * TILE, count, strips, sums)
                for t in range(count):
                    pair = pairs[p + t]
                    to, weight = pair // top_k * hidden + begins * TILE, weights[pair]
                    for s in range(strips):
                        own_at, columns = _sum_at(t, s), min(TILE, hidden - (begins + s) * TILE)
                        if columns == TILE:
                            add_strip(sums, own_at, weight, flat, to + s * TILE)
                        else:
                            own, target = sums[own_at:], flat[to + s * TILE :]
                            for i in range(columns):
                                target[i] += weight * own[i]
        begins = fetch_add(counter, 1) * strips_an_item


@kernel()
def _round_row(x, row, steps, tail, act, at):
    """Write row ``row`` of ``x`` as bfloat16, zeros up to whole tiles; ``tail`` is scratch."""
    cols = x.shape[1]
    whole = cols // GROUP * GROUP
    flat = x.reshape(-1)
    if whole:
        round_rows(flat, row * cols, whole, act, at)
    if whole < cols:
        tail[:GROUP] = 0
        rest = x[row, whole:]
        for k in range(cols - whole):
            tail[k] = rest[k]
        round_rows(tail, 0, GROUP, act, at + 2 * whole)
        whole += GROUP
    if whole < steps * GROUP:
        tail[:GROUP] = 0
        for k in range(whole, steps * GROUP, GROUP):
            round_rows(tail, 0, GROUP, act, at + 2 * k)


@kernel()
def _round_items(counter, x, steps, pairs, total, top_k, act, act_stride, tail):
    """Take pairs, 32 at a time, and write their tokens' rows in the order of the pairs."""
    items = -(-total // TOKENS)
    item = fetch_add(counter, 3)
    while item < items:
        for p in range(item * TOKENS, min((item + 1) * TOKENS, total)):
            _round_row(x, pairs[p] // top_k, steps, tail, act, p * act_stride)
        fetch_add(counter, 4)
        item = fetch_add(counter, 3)
    # As in the other loops: whoever waits here waits for running threads only.
    wait_for(counter, 4, items)


@kernel(parallel=True)
def run_tiles(
    filler, blocks, block_stride, up_strip, up_steps, groups, section, down_filler, down_strip,
    down_steps, down_strips, kind, alpha, limit, up_offset, gated, up_bias, down_bias,
    intermediate, active, experts, first, pairs, top_k, weights, x, act, act_stride, h, h_stride,
    counter, tiles, sums, threads, out,
):  # fmt: skip
    """Add every pair's weighted expert output to ``out``, as ``run_pairs`` does."""
    counter[:] = 0
    total = np.int64(first[active])
    for w in prange(threads):
        _round_items(counter, x, up_steps, pairs, total, top_k, act, act_stride, sums[w])
        begin()
        _up_items(
            counter, filler, blocks, block_stride, up_strip, up_steps, groups, act,
            act_stride, kind, alpha, limit, up_offset, gated, up_bias, intermediate, active,
            experts, first, h, h_stride, tiles[w], sums[w],
        )  # fmt: skip
        _down_items(
            counter, down_filler, blocks, block_stride, section, down_strip, down_steps,
            down_strips, h, h_stride, down_bias, active, experts, first, pairs, top_k, weights,
            out, tiles[w], sums[w],
        )  # fmt: skip
        end()


@kernel()
def _matrix_items(
    counter, filler, packed, strip, steps, strips_an_item, act, act_stride, bias, has_bias,
    out, tiles, sums,
):  # fmt: skip
    """Take strips of a matrix and write their products with all tokens."""
    tokens, rows = out.shape
    flat, strips_all = out.reshape(-1), -(-rows // TILE)
    begins = fetch_add(counter, 0) * strips_an_item
    while begins < strips_all:
        strips = min(strips_an_item, strips_all - begins)
        _widen(filler, packed, begins * strip, strip, strips, steps, tiles, tokens)
        for p in range(0, tokens, TOKENS):
            count = min(TOKENS, tokens - p)
            for t in range(count):
                column = begins * TILE
                width = min(strips * TILE, rows - column)
                expect_writes(flat, (p + t) * rows + column, width)
            _multiply(
                filler, packed, begins * strip, strip, strips, steps, act, p * act_stride,
                act_stride, count, tokens, tiles, sums,
            )  # fmt: skip
            for t in range(count):
                for s in range(strips):
                    own_at, column = _sum_at(t, s), (begins + s) * TILE
                    columns, to = min(TILE, rows - column), (p + t) * rows + column
                    if columns == TILE:
                        copy_strip(sums, own_at, flat, to)
                    else:
                        own, target = sums[own_at:], flat[to:]
                        for i in range(columns):
                            target[i] = own[i]
                    if has_bias:
                        own, target = bias[column:], flat[to:]
                        for i in range(columns):
                            target[i] += own[i]
        begins = fetch_add(counter, 0) * strips_an_item


@kernel(parallel=True)
def multiply_tiles(
    filler, packed, strip, steps, strips_an_item, x, every, act, act_stride, bias, has_bias,
    counter, tiles, sums, threads, out,
):  # fmt: skip
    """Write the products of ``x`` ``[T, K]`` with one packed matrix to ``out`` ``[T, N]``.

    ``every`` counts from 0 to T.
    """
    counter[:] = 0
    tokens = len(x)
    for w in prange(threads):
        _round_items(counter, x, steps, every, tokens, 1, act, act_stride, sums[w])
        begin()
        _matrix_items(
            counter, filler, packed, strip, steps, strips_an_item, act, act_stride, bias, has_bias,
            out, tiles[w], sums[w],
        )  # fmt: skip
        end()
