"""Parts of a step of several tokens: what all of them are multiplied with is read once.

As in :mod:`cpu_experts.decoder.ops` threads take items off counters of two numbers, items taken
and items done. What one token needs by itself (a norm, its quantized numbers, its experts) is an
item here, because there are several tokens to share out among the threads.
"""

# numba infers the types of compiled functions from their callers.
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined"

from __future__ import annotations

import numpy as np

from cpu_experts.decoder.ops import activate, normalize
from cpu_experts.jit.addresses import bytes_at, floats_at
from cpu_experts.jit.compiled import kernel
from cpu_experts.kernels.dots import is_quantized
from cpu_experts.kernels.experts import ROWS, dot_rows
from cpu_experts.kernels.micro import fetch_add, wait_for
from cpu_experts.kernels.shares import share, shares
from hybrid.formats.strips import GROUP, TILE

#: Arguments of one type: numba compiles a function anew for every number written out in a call.
_ZERO, _ONE, _TWO = np.int64(0), np.int64(1), np.int64(2)


@kernel()
def place_of(formats, fmt):
    """Which of the three activations of a token a format reads, see :func:`activate_token`."""
    if fmt == formats[0]:
        return _ZERO
    return _ONE if fmt == formats[1] else _TWO


@kernel()
def activate_token(formats, x, cols, acts, n):
    """Quantize ``x[:cols]`` of token ``n`` for up to three formats (0: none).

    ``acts`` ``[3, N, bytes]`` holds what quantized formats read, once for equal ones.
    """
    for at in range(3):
        fmt = formats[at]
        if fmt != 0 and place_of(formats, fmt) == at and is_quantized(fmt):
            activate(fmt, x, cols, acts[at, n])


@kernel()
def given(formats, fmt, rows, acts):
    """Return what a format's products read of tokens ``rows`` ``[N, width]``, and its stride.

    That are the numbers themselves, or what :func:`activate_token` made of them.
    """
    if is_quantized(fmt):
        return acts[place_of(formats, fmt)].reshape(-1), np.int64(acts.shape[2])
    return rows.reshape(-1).view(np.uint8), np.int64(4 * rows.shape[1])


@kernel()
def normalize_tokens(counter, at, norm, formats, source, picked, count, normed, acts):
    """Take tokens: write the norm of ``source[picked[n]]`` to ``normed[n]``, and quantize it.

    Returns when all ``count`` are done.
    """
    size = norm["size"]
    while True:
        n = fetch_add(counter, at)
        if n >= count:
            break
        out = normed[n]
        normalize(norm, source[picked[n]], out)
        out[size : -(-size // GROUP) * GROUP] = 0
        activate_token(formats, out, size, acts, n)
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, count)


@kernel()
def activate_tokens(counter, at, fmt, rows, cols, count, acts):
    """Take tokens: quantize ``rows[n, :cols]`` for a format; returns when all are done."""
    if not is_quantized(fmt):
        return
    while True:
        n = fetch_add(counter, at)
        if n >= count:
            break
        activate(fmt, rows[n], cols, acts[_ZERO, n])
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, count)


@kernel()
def multiply_tokens(
    matrix, first, last, then, act, stride, order, count, buf, scale, add, out, out_at
):
    """Write (or add) ``scale * (matrix @ act + bias)`` of the strips ``first : last`` to ``out``.

    ``act`` has ``count`` rows of ``stride`` bytes, ``out`` ``[count, ..]`` gets strip ``s`` at
    column ``out_at + 16 s``; ``order`` counts up from 0. The strip ``then`` is what is read next.
    """
    if last <= first:
        return
    size, rows = matrix["strip_bytes"], matrix["rows"]
    weights = bytes_at(matrix["at"], -(-rows // TILE) * size)
    bias = floats_at(matrix["bias"], rows)
    for s in range(first, last):
        columns = min(TILE, rows - s * TILE)
        for p in range(0, count, ROWS):
            here = min(ROWS, count - p)
            after = s if p + ROWS < count else (s + 1 if s + 1 < last else then)
            dot_rows(
                matrix["format"],
                weights,
                s * size,
                after * size,
                act,
                stride,
                order,
                p,
                here,
                matrix["inner"],
                buf,
                _ZERO,
            )
            for t in range(here):
                found, row = buf[t * TILE :], out[p + t]
                part = row[out_at + s * TILE :]
                if matrix["bias"]:
                    behind = bias[s * TILE :]
                    for i in range(columns):
                        found[i] += behind[i]
                if add:
                    for i in range(columns):
                        part[i] += scale * found[i]
                else:
                    for i in range(columns):
                        part[i] = scale * found[i]


@kernel()
def multiply_all(counter, at, matrix, act, stride, order, count, buf, scale, add, out):
    """Take items of a matrix product of all tokens; returns when all are done."""
    strips, least, threads = -(-matrix["rows"] // TILE), matrix["strips"], matrix["threads"]
    while True:
        first, last = share(fetch_add(counter, at), strips, least, threads)
        if first >= strips:
            break
        multiply_tokens(
            matrix, first, last, first, act, stride, order, count, buf, scale, add, out, _ZERO
        )
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, shares(strips, least, threads))


@kernel()
def project_all(counter, at, layer, formats, normed, acts, order, count, buf, qkv):
    """Take items of q, k and v as one product; returns when all are done."""
    q, k, v, one = layer["q"], layer["k"], layer["v"], np.float32(1)
    strips, least, threads = _ZERO, q["strips"], q["threads"]
    for rows in (q["rows"], k["rows"], v["rows"]):
        strips += -(-rows // TILE)
    while True:
        first, last = share(fetch_add(counter, at), strips, least, threads)
        if first >= strips:
            break
        behind = _ZERO
        for side in range(3):
            matrix = q if side == 0 else (k if side == 1 else v)
            here = -(-matrix["rows"] // TILE)
            begin, end = max(first, 0), min(last, here)
            if begin < end:
                act, stride = given(formats, matrix["format"], normed, acts)
                multiply_tokens(
                    matrix, begin, end, begin, act, stride, order, count, buf, one, False, qkv,
                    behind,
                )  # fmt: skip
            first, last, behind = first - here, last - here, behind + matrix["rows"]
        fetch_add(counter, at + 1)
    wait_for(counter, at + 1, shares(strips, least, threads))
