"""The validated way in to the one-token kernels: a decoder made of layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_experts.checks import check_floats, check_matrix
from cpu_experts.decoder import decode_step, prompt, step_buffers
from cpu_experts.decoder.attention import CHUNK
from cpu_experts.decoder.kv import KeyValues
from cpu_experts.decoder.layers import Layer
from cpu_experts.decoder.matrices import Matrix, Norm
from cpu_experts.decoder.pages import PagedSequence, Pages
from cpu_experts.decoder.records import HEAD, LAYER
from cpu_experts.decoder.step import Work, decode_tokens
from cpu_experts.decoder.step_buffers import Rows, scratch_of
from cpu_experts.decoder.step_buffers import padded as _padded
from cpu_experts.decoder.texts import Texts, alike, apart
from cpu_experts.jit.workers import LOCK, used_threads
from cpu_experts.kernels import experts as kernels
from cpu_experts.kernels.records import fill_record
from hybrid.formats.activations import activation_bytes
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import F32, GROUP, TILE, pad

#: A sequence's keys and values, by themselves or among others'.
Cache = KeyValues | PagedSequence
#: Buffers are for whole such numbers of tokens.
_TOKENS = 8


class Decoder:
    """A decoder that computes one token at a time, or several of one or more texts.

    Parameters
    ----------
    layers
        In order; all see the same rotary embedding.
    norm, lm_head, scale
        ``logits = scale * lm_head(norm(x))``.
    paired
        Whether the rotary embedding turns neighbours instead of halves.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        norm: Norm,
        lm_head: Matrix,
        scale: float = 1.0,
        paired: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.hidden, self.vocabulary = lm_head.cols, lm_head.rows
        for layer in layers:
            sizes = [layer.norm.weight.size, layer.q.cols, layer.o.rows, layer.ffn_norm.weight.size]
            if any(size != self.hidden for size in sizes):
                raise ShapeError(f"a layer of {sizes} in a decoder of {self.hidden}")
        self._norm, self._lm_head, self._paired = norm, lm_head, paired
        self._head = np.zeros(1, HEAD)
        fill_record(self._head[0], {"norm": norm.record(), "scale": scale})
        self._table = np.zeros(len(self.layers), LAYER)
        self._threads = 0
        self._spent = np.zeros((len(self.layers) + 1, 3), np.int64)
        self._spent_by_many = np.zeros_like(self._spent)
        self._since = (0, 0.0)
        self._work: decode_step.Work | None = None
        self._rows: Rows | None = None
        self._tokens: Work | None = None
        self._stored = np.array([layer.stored[0] for layer in self.layers], np.int64)
        turned = [layer.head_dim for layer in self.layers if layer.delta is None]
        self._pairs = max(turned, default=0) // 2

    @property
    def scale(self) -> float:
        """What logits are multiplied with."""
        return float(self._head[0]["scale"])

    def new_cache(self) -> KeyValues:
        """Return an empty cache; :meth:`~.kv.KeyValues.store` every layer first."""
        return KeyValues([layer.window for layer in self.layers])

    @property
    def keeps_states(self) -> bool:
        """Whether a layer keeps a state, from which single tokens cannot be taken back."""
        return any(layer.delta is not None for layer in self.layers)

    def new_pages(self, size_bytes: int, sequences: int) -> Pages:
        """Return memory for the caches of up to so many sequences."""
        return Pages([layer.stored[:2] for layer in self.layers], size_bytes, sequences)

    def step(self, x: F32, cos: F32, sin: F32, cache: Cache, logits: F32) -> None:
        """Compute one token's logits and add the token to the cache.

        Parameters
        ----------
        x
            The embedded token, ``[D]`` float32.
        cos, sin
            Rotary embedding of its position, ``[rotary / 2]`` float32.
        cache
            Keys and values of the tokens before it.
        logits
            ``[V]`` float32, written.

        Raises
        ------
        ShapeError
            When an array has another shape or type.
        """
        check_floats("logits", logits, self.vocabulary)
        self._run(slice(None), self._head, x, cos, sin, cache, logits)
        cache.advance()

    def step_tokens(
        self,
        x: F32,
        cos: F32,
        sin: F32,
        cache: KeyValues,
        logits: F32,
        *,
        kept: NDArray[np.int32],
        texts: int = 1,
        begins: NDArray[np.int64] | None = None,
    ) -> None:
        """Add the next tokens of some texts to the cache, and compute the logits of some of them.

        Parameters
        ----------
        x
            The embedded tokens, ``[T, D]`` float32: as many of every text, text by text. A token
            sees those of its text before it.
        cos, sin
            Rotary embedding of their positions, ``[T, rotary / 2]`` float32.
        cache
            Keys and values of the tokens before them, of all texts.
        logits
            ``[kept, V]`` float32, written.
        kept
            Which tokens' logits are asked for.
        texts
            How many there are.
        begins
            Where each text begins, ``[texts]``: relative to the next position, so usually below
            0. What the cache has before that is no part of it. Everywhere unless given.

        Raises
        ------
        ShapeError
            When an array has another shape or type, or the cache is of another number of texts.

        Notes
        -----
        Weights are read once for all tokens. The cache is as before when this raises.
        """
        tokens = x.shape[0]
        self._check_kept(tokens, logits, kept)
        given = alike(tokens, texts, begins)
        self._make_room(cache, slice(None), tokens, texts)
        self._run_tokens(slice(None), x, cos, sin, cache.states[None], logits, kept, given)
        cache.advance(tokens // texts)

    def step_sequences(
        self,
        x: F32,
        cos: F32,
        sin: F32,
        sequences: Sequence[PagedSequence],
        counts: Sequence[int],
        logits: F32,
        *,
        kept: NDArray[np.int32],
    ) -> None:
        """Add the next ``counts`` tokens to each of some sequences, as :meth:`step_tokens` does.

        Parameters
        ----------
        x, cos, sin, logits, kept
            As there; tokens come sequence by sequence.
        sequences, counts
            Who gets them, all of one memory, and how many each.

        Raises
        ------
        ShapeError
            When an array has another shape or type, or a sequence gets none or comes twice.
        PagesFull
            When there is no room for them; nothing is computed then.
        """
        tokens = x.shape[0]
        self._check_kept(tokens, logits, kept)
        given = apart([sequence.row for sequence in sequences], counts)
        if len(given.owners) != tokens:
            raise ShapeError(f"{tokens} tokens are given, sequences get {list(counts)}")
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.make_room(count)
        states = sequences[0].of.states
        self._run_tokens(slice(None), x, cos, sin, states, logits, kept, given)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.advance(count)

    def _check_kept(self, tokens: int, logits: F32, kept: NDArray[np.int32]) -> None:
        check_matrix("logits", logits, (kept.size, self.vocabulary))
        if kept.dtype != np.int32 or (kept.size and not 0 <= kept.min() <= kept.max() < tokens):
            raise ShapeError(f"kept is {kept.dtype} {kept.tolist()}, tokens of {tokens} are int32")

    def _make_room(self, cache: KeyValues, layers: slice, tokens: int, texts: int) -> None:
        """Give a cache of so many texts room for ``tokens`` more of all together."""
        if not np.array_equal(cache.heads[layers], texts * self._stored[layers]):
            raise ShapeError(
                f"the cache has {cache.heads[layers].tolist()} heads, {texts} texts have"
                f" {(texts * self._stored[layers]).tolist()}"
            )
        cache.make_room(tokens // texts)

    def layer_tokens(self, index: int, x: F32, cos: F32, sin: F32, cache: KeyValues) -> F32:
        """Return what a single layer makes of several tokens of a text, ``[T, D]``.

        The cache stays: what is written behind the layer's last position is not counted.
        """
        nothing, none = np.zeros((0, self.vocabulary), np.float32), np.zeros(0, np.int32)
        one, given = slice(index, index + 1), alike(x.shape[0], 1, None)
        self._make_room(cache, one, x.shape[0], 1)
        return self._run_tokens(one, x, cos, sin, cache.states[None, one], nothing, none, given)

    def head_tokens(self, x: F32, logits: F32) -> None:
        """Write the logits ``[T, V]`` of the last layer's hidden states ``x``."""
        check_matrix("logits", logits, (x.shape[0], self.vocabulary))
        every, no_angles = np.arange(x.shape[0], dtype=np.int32), np.zeros((x.shape[0], 0))
        angles, given = no_angles.astype(np.float32), alike(x.shape[0], 1, None)
        states = self.new_cache().states[None, :0]
        self._run_tokens(slice(0), x, angles, angles, states, logits, every, given)

    def begin_run(self) -> None:
        """Count anew what steps take."""
        self._spent[:] = 0
        self._spent_by_many[:] = 0
        self._since = decode_step.clock(), time.perf_counter()

    def spent_s(self, *, many: bool = False) -> NDArray[np.float64] | None:
        """Return the seconds that steps took since :meth:`begin_run`, by layer and part.

        Those of one token, or those of ``many``.

        Returns
        -------
        ``[layers + 1, 3]``: attention and router, routed experts, shared experts or a dense layer;
        of the last row only the first counts, the output head. As the first thread saw it, which
        waits for the others; without what is done before and after. None where the processor has
        no clock that the kernels can read.
        """
        clock, begun_s = self._since
        passed = decode_step.clock() - clock
        if passed <= 0:
            return None
        spent = self._spent_by_many if many else self._spent
        found: NDArray[np.float64] = spent * ((time.perf_counter() - begun_s) / passed)
        return found

    def layer_step(self, index: int, x: F32, cos: F32, sin: F32, cache: KeyValues) -> F32:
        """Return what a single layer makes of the hidden state ``x``; the cache stays.

        The token's key and value are written behind the layer's last position and not counted.
        """
        return self._run(slice(index, index + 1), self._head[:0], x, cos, sin, cache, x)

    def head_step(self, x: F32, logits: F32) -> None:
        """Write the logits of the last layer's hidden state ``x``."""
        check_floats("logits", logits, self.vocabulary)
        nothing = np.zeros(0, np.float32)
        self._run(slice(0), self._head, x, nothing, nothing, self.new_cache(), logits)

    def attend(self, index: int, q: F32, k: F32, v: F32, cos: F32, sin: F32, cache: Cache) -> F32:
        """Attention of the next tokens in one layer, between its projections.

        Parameters
        ----------
        q, k, v
            What the layer's projections make of ``T`` tokens, ``[T, rows]`` float32.
        cos, sin
            Rotary embedding of their positions, ``[T, rotary / 2]`` float32.
        cache
            Keys and values of the tokens before them; theirs are added.

        Returns
        -------
        float32 ``[T, heads * head_dim]``, the input of the layer's output projection.

        Raises
        ------
        ShapeError
            When an array has another shape or type.
        """
        layer, tokens = self.layers[index], q.shape[0]
        if layer.latent is not None or layer.delta is not None or layer.gated:
            raise ShapeError("attention of many tokens takes heads without gates, and their keys")
        sides = (("q", q), ("k", k), ("v", v))
        for (name, side), matrix in zip(sides, layer.projections, strict=True):
            check_matrix(name, side, (tokens, matrix.rows))
        check_matrix("sin", sin, (tokens, None))
        check_matrix("cos", cos, sin.shape)
        cache.reserve(index, tokens)
        out = np.empty((tokens, layer.o.cols), np.float32)
        many, one = layer.heads // layer.kv_heads, slice(index, index + 1)
        with LOCK:
            threads = used_threads()
            self._fill(threads)
            step = max(1, prompt.ROWS // many)
            if self._rows is None or self._rows.threads != threads:
                self._rows = Rows.allocate(self.layers, threads)
            prompt.attend(
                self._table[one], cache.states[one], q, k, v, cos, sin, self._paired, step,
                *self._rows[1:], out, threads,
            )  # fmt: skip
        cache.advance_layer(index, tokens)
        return out

    def _run(
        self, layers: slice, head: Any, x: F32, cos: F32, sin: F32, cache: Cache, logits: F32
    ) -> F32:
        check_floats("x", x, self.hidden)
        check_floats("sin", sin, cos.size)
        check_floats("cos", cos, min(cos.size, self._pairs))
        table = self._table[layers]
        if table.size:
            cache.make_room()
        with LOCK:
            threads = used_threads()
            work = self._buffers(threads, cache.capacity)
            states = cache.states[layers]
            work.x[:] = x
            decode_step.decode(table, states, head, cos, sin, self._paired, work, logits, threads)
            result: F32 = work.x.copy()
            return result

    def _run_tokens(
        self, layers: slice, x: F32, cos: F32, sin: F32, states: Any, logits: F32,
        kept: NDArray[np.int32], texts: Texts,
    ) -> F32:  # fmt: skip
        tokens = x.shape[0]
        check_matrix("x", x, (tokens, self.hidden))
        check_matrix("sin", sin, (tokens, None))
        check_matrix("cos", cos, (tokens, min(sin.shape[1], self._pairs)))
        with LOCK:
            threads = used_threads()
            self._fill(threads)
            if self._tokens is None or self._tokens.x.shape[0] < tokens:
                room = pad(tokens, _TOKENS)
                self._tokens = step_buffers.allocate(
                    self.layers, self.hidden, room, threads, self._spent_by_many
                )
            work = self._tokens
            work.x[:tokens] = x
            decode_tokens(
                self._table[layers], states, self._head, cos, sin, self._paired, work, tokens,
                *texts, kept, logits, threads,
            )  # fmt: skip
            result: F32 = work.x[:tokens].copy()
            return result

    def _fill(self, threads: int) -> None:
        """Describe the layers for this number of threads."""
        if threads != self._threads:
            for record, layer in zip(self._table, self.layers, strict=True):
                layer.fill(record, threads)
            fill_record(self._head[0], {"matrix": self._lm_head.record(threads)})
            self._work, self._tokens, self._threads = None, None, threads

    def _buffers(self, threads: int, capacity: int) -> decode_step.Work:
        self._fill(threads)
        chunks = capacity // CHUNK + 1
        heads = max(layer.heads for layer in self.layers)
        if self._work is None or self._work.parts.shape[0] < heads * chunks:
            self._work = self._allocate(threads, heads * chunks)
        return self._work

    def _allocate(self, threads: int, parts: int) -> decode_step.Work:
        layers = self.layers
        many = max(layer.heads // layer.kv_heads for layer in layers)
        dim = max(layer.head_dim for layer in layers)
        latents = [layer for layer in layers if layer.latent is not None]
        inner = [m.cols for layer in latents if layer.latent for m in layer.latent.matrices]
        wide = pad(max(self.hidden, *(layer.o.cols for layer in layers), *inner), GROUP)
        whole = max((layer.heads * layer.head_dim for layer in layers), default=0)
        queries = [m.rows for layer in latents if layer.latent for m in layer.latent.matrices[:-2]]
        routed = [layer for layer in layers if layer.router is not None]
        experts = max((layer.router.experts for layer in routed if layer.router), default=0)
        chosen = max((layer.router.top_k for layer in routed if layer.router), default=1)
        groups = max((layer.router.groups for layer in routed if layer.router), default=1)
        h = [layer.experts.h_stride for layer in routed if layer.experts]
        shared = [layer.shared.h_stride for layer in layers if layer.shared]
        counters = int(decode_step.ATTEND) + 2 + max(layer.kv_heads for layer in layers)
        count = max(many, chosen, 16) + 1
        x, floats = np.zeros(self.hidden, np.float32), _padded
        return decode_step.Work(
            x=x,
            x_row=x.reshape(1, -1),
            qkv=floats(max(sum(m.rows for m in layer.projections) for layer in layers)),
            queries=floats(max(queries, default=0)),
            wide=floats(whole if latents else 0),
            expanded=floats(max((layer.o.cols for layer in latents), default=0)),
            attended=floats(max(wide, whole)),
            parts=floats(parts, dim),
            stats=np.zeros((parts, 2), np.float32),
            scores=floats(experts + 1),
            h=np.zeros(chosen * pad(int(max(h, default=0)), 64), np.uint8),
            h_shared=np.zeros(pad(int(max(shared, default=0)), 64), np.uint8),
            counters=np.zeros((len(layers) + 1, pad(counters, 8)), np.int64),
            spent=self._spent,
            rows=np.arange(count, dtype=np.int32),
            zeros=np.zeros(count, np.int32),
            firsts=np.arange(count, dtype=np.int64),
            alone=alike(1, 1, None).records,
            my_normed=floats(threads, wide),
            my_act=np.zeros((threads, activation_bytes(wide) + 64), np.uint8),
            my_buf=floats(threads, max(kernels.SCRATCH, many * TILE, *scratch_of(layers))),
            my_queries=floats(threads, many * dim),
            my_scores=floats(threads, many * CHUNK),
            my_key=floats(threads, dim),
            my_ids=np.zeros((threads, pad(chosen, 8) + 8), np.int64),
            my_weights=floats(threads, max(chosen, groups)),
            my_choice=floats(threads, 2 * max(experts, 1)),
        )

    def bytes_per_token(self) -> int:
        """Bytes of weights that a step reads; the cache's come on top."""
        total = self._lm_head.nbytes
        for layer in self.layers:
            total += sum(matrix.nbytes for matrix in (*layer.projections, layer.o))
            if layer.latent is not None:
                total += sum(matrix.nbytes for matrix in layer.latent.matrices)
                kv_b = layer.latent.kv_b  # its rows for keys are absorbed
                total -= kv_b.nbytes * layer.latent.nope // (layer.latent.nope + layer.latent.value)
            if layer.router is not None and layer.experts is not None:
                total += layer.router.matrix.nbytes
                total += layer.router.top_k * layer.experts.shape.block_bytes
            if layer.shared is not None:
                total += layer.shared.shape.block_bytes
        return total
