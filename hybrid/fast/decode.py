"""What the fast path computes: new tokens of one text or of a batch, into the kernels' own cache.

One new token goes through the one-token kernels. A few of a text, or one of every text of a
batch, are a step of the kernels, which read all weights once for it. Longer prompts go through
transformers' layers with our attention (see :mod:`hybrid.fast.prompt`), whose products of many
tokens are the faster ones then. :mod:`hybrid.fast.attach` says which calls are ours at all.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.layers import Layer
from hybrid.fast.decoder_parts import rotary_row, rotary_sides
from hybrid.fast.kv_cache import CacheForm, Sequence
from hybrid.fast.prompt import OnPrompt, Piece, Teller, attention_in_pieces, in_pieces
from hybrid.fast.state_layer import StateShape
from hybrid.formats.registry import is_quantized
from hybrid.stopwatch import Stopwatch
from hybrid.transformers_api import cache_argument, causal_output, given_cache

#: Positions whose rotary embedding is computed at a time.
_POSITIONS = 512
#: Tokens that a step has at most, unless they are one of every text. Up to so many it was the
#: faster way in every measurement: of 12 layers of 1,024 numbers, 32 experts in q4_0 and dense
#: layers in q8_0, one thread of an EPYC takes 12 instead of 22 ms for 8 tokens, and 27 instead of
#: 37 for 32 (43 in bfloat16). A prompt's products are made for many tokens, matrix units included.
STEP = 32
#: Kinds of rotary embedding whose angles depend on how long the sequence is by now.
GROWING = ("dynamic", "longrope")


class FastDecoder:
    """New tokens of one text, or of the texts of a batch.

    Parameters
    ----------
    model
        A causal language model of transformers.
    decoder
        What it computes, for the kernels.
    pairs
        How many pairs its rotary embedding turns.

    Attributes
    ----------
    watch
        What single tokens took in the kernels since :meth:`begin_run`, and how many they were.
    step_watch
        The same of steps of several tokens.
    layers
        The model's, of transformers.
    growing
        Whether how a position turns depends on how long the text is by now.
    rounded
        Memory for a token's logits in the model's type, ``[V]``.
    """

    def __init__(self, model: Any, decoder: Decoder, pairs: int) -> None:
        self.decoder = decoder
        self.watch, self.step_watch = Stopwatch(), Stopwatch()
        self._base = model.get_decoder()
        self._dtype = model.dtype
        self.rounded = torch.empty(decoder.vocabulary, dtype=model.dtype)
        self._pairs = pairs
        self._scale = float(getattr(self._base, "embedding_multiplier", 1.0))
        self.form = CacheForm(
            shapes=tuple(layer.stored for layer in decoder.layers),
            windows=tuple(layer.window for layer in decoder.layers),
            states=tuple(_state(layer) for layer in decoder.layers),
            dtype=model.dtype,
        )
        latents = [layer.latent for layer in decoder.layers if layer.latent is not None]
        self.compressed = bool(latents)
        plain = not any(layer.gated or layer.delta for layer in decoder.layers)
        self.attends = plain and not self.compressed
        self.rounds_less = any(is_quantized(latent.kv_b.format) for latent in latents)
        self.layers = self._base.layers
        self.growing = getattr(self._base.rotary_emb, "rope_type", "default") in GROWING
        self._grows_from = _grows_from(model.config.get_text_config()) if self.growing else None
        self._angles: dict[int, list[tuple[Any, Any]]] = {}

    def next_token(self, ids: Tensor, position: int, cache: DynamicCache, logits: Tensor) -> bool:
        """Compute the token ``ids`` ``[1, 1]`` at a position and write its ``logits`` ``[V]``.

        Returns whether it is done: a cache is as before where numbers leave the range of the
        kernels' cache.
        """
        sequence = self.packed(cache)
        x = self.embedded(ids)[0]
        cos, sin = self.rotary(position)
        with self.watch:
            self.decoder.step(x, cos, sin, sequence.kv, logits.numpy())
        sequence.advance()
        if sequence.left_the_range():
            sequence.take_back(1)
            self.watch.take_back()
            return False
        return True

    def forward(self, arguments: dict[str, Any]) -> MoeCausalLMOutputWithPast | None:
        """Compute the single token of a call of the model's ``forward``.

        None, and a cache as before, where numbers leave the range of the kernels' cache.
        """
        ids, cache = arguments["input_ids"], given_cache(arguments)
        given = arguments.get("position_ids")
        position = int(cache.get_seq_length() if given is None else given)
        logits = torch.empty(1, 1, self.decoder.vocabulary)
        if not self.next_token(ids, position, cache, logits.view(-1)):
            return None
        return causal_output(logits.to(self._dtype), cache)

    def step(
        self,
        arguments: dict[str, Any],
        begins: NDArray[np.int64] | None,
        on_prompt: OnPrompt | None,
    ) -> MoeCausalLMOutputWithPast | None:
        """Compute several tokens of a call of the model's ``forward``, as many of every text.

        ``begins`` is where each text begins, relative to its next position; None where nothing
        lies in front of any. Returns None, and leaves a cache as before, where numbers leave the
        range of the kernels' cache.
        """
        ids, cache = arguments["input_ids"], given_cache(arguments)
        texts, tokens = ids.shape
        teller = Teller(on_prompt, tokens)
        sequence = self.packed(cache, texts)
        positions = arguments.get("position_ids")
        if positions is None:
            positions = (torch.arange(tokens) + cache.get_seq_length())[None]
        x = self.embedded(ids)
        cos, sin = self._rotary_of(positions.expand(texts, tokens))
        kept = _kept(arguments.get("logits_to_keep", 0), texts, tokens)
        logits = torch.empty(texts, kept.size // texts, self.decoder.vocabulary)
        with self.step_watch:
            self.decoder.step_tokens(
                x,
                cos,
                sin,
                sequence.kv,
                logits.flatten(0, 1).numpy(),
                kept=kept,
                texts=texts,
                begins=begins,
            )
        sequence.advance(tokens)
        if sequence.left_the_range():
            sequence.take_back(tokens)
            self.step_watch.take_back()
            return None
        if tokens > 1:
            teller.tell(tokens)
        return causal_output(logits.to(self._dtype), cache)

    def embedded(self, ids: Tensor) -> NDArray[np.float32]:
        """Return tokens ``[texts, T]`` as the first layer takes them, ``[texts * T, D]``."""
        x = self._base.embed_tokens(ids).detach().float().flatten(0, 1)
        if self._scale != 1.0:
            x = x * self._scale
        found: NDArray[np.float32] = x.contiguous().numpy()
        return found

    def begin_run(self) -> None:
        """Count anew what steps take; the decoder counts it by layer and part."""
        self.watch.reset()
        self.step_watch.reset()
        self.decoder.begin_run()

    def prompt(
        self, arguments: dict[str, Any], slow: Any, on_prompt: OnPrompt | None
    ) -> MoeCausalLMOutputWithPast:
        """Compute the tokens of a call in pieces, through ``slow``, transformers' ``forward``.

        Attention is ours, but over a compressed cache, where it is transformers', too; and from
        the piece on whose numbers leave the range of the kernels' cache. There is one piece where
        all positions turn by how long the whole prompt is.
        """
        ids, cache = arguments["input_ids"], given_cache(arguments)
        total = ids.shape[1]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(total)[None] + cache.get_seq_length()
        keep = arguments.get("logits_to_keep", 0)
        kept, teller, ours = [], Teller(on_prompt, total), self.attends
        whole = self._grows_within(int(positions.max()))
        for cut, logits_kept in [(slice(0, total), keep)] if whole else in_pieces(ids, keep):
            piece = functools.partial(
                slow,
                input_ids=ids[:, cut],
                position_ids=positions[:, cut],
                **cache_argument(cache),
                use_cache=True,
                logits_to_keep=logits_kept,
            )
            if ours:
                sequence = self.packed(cache)
                with self._attention(sequence, positions[:, cut]):
                    output = piece()
                if sequence.left_the_range():
                    sequence.take_back(ids[:, cut].shape[1])
                    ours = False
            if not ours:
                output = piece()
            kept.append(output.logits)
            teller.tell(min(total, cut.stop))
        if len(kept) > 1:
            every = torch.cat(kept, dim=1)
            output.logits = every[:, -keep:] if keep else every
        return output  # type: ignore[no-any-return]

    def _grows_within(self, last: int) -> bool:
        """Whether a text up to a position is long enough for its angles to depend on its length."""
        return self._grows_from is not None and last >= self._grows_from

    def _attention(self, sequence: Sequence, positions: Tensor) -> AbstractContextManager[None]:
        piece = Piece(self.decoder, sequence, *self.angles_at(positions))
        return attention_in_pieces(self.layers, piece)

    def angles_at(self, positions: Tensor) -> tuple[Any, Any]:
        """Cosines and sines of positions ``[1, T]``, ``[T, pairs]`` float32 each."""
        cos, sin = (
            side.detach().float().reshape(positions.shape[1], -1)[:, : self._pairs].contiguous()
            for side in rotary_sides(self._base.rotary_emb, torch.empty(1), positions)
        )
        return cos.numpy(), sin.numpy()

    def packed(self, cache: DynamicCache, texts: int = 1) -> Sequence:
        """Return the sequence of a cache of so many texts, its content in the kernels' layout."""
        return Sequence.of(cache, self.form, texts)

    def _rotary_of(self, positions: Tensor) -> tuple[Any, Any]:
        """Cosines and sines of positions ``[texts, T]``, ``[texts * T, pairs]`` float32 each."""
        flat = positions.reshape(-1)
        if self.growing or flat.numel() > STEP:
            return self.angles_at(flat[None])
        cos, sin = zip(*map(self.rotary, flat.tolist()), strict=True)
        return np.stack(cos), np.stack(sin)

    def rotary(self, position: int) -> tuple[Any, Any]:
        """Return cosines and sines of a position, ``[pairs]`` float32 each."""
        if self.growing:
            return self._turn(torch.tensor([[position]]))[0]
        start = position - position % _POSITIONS
        if start not in self._angles:
            self._angles[start] = self._turn(torch.arange(start, start + _POSITIONS)[None])
        return self._angles[start][position - start]

    def _turn(self, positions: Tensor) -> list[tuple[Any, Any]]:
        cos, sin = rotary_sides(self._base.rotary_emb, torch.empty(1), positions)
        return [
            (rotary_row(c, self._pairs), rotary_row(s, self._pairs))
            for c, s in zip(cos[0], sin[0], strict=True)
        ]


def _state(layer: Layer) -> StateShape | None:
    """What a layer keeps, if that is a state."""
    delta = layer.delta
    if delta is None:
        return None
    heads = delta.value_heads
    return StateShape(delta.taps, delta.channels, heads, delta.key_dim, delta.value_dim)


def is_prompt(texts: int, tokens: int) -> bool:
    """Whether so many new tokens of each of some texts are more than a step has."""
    return tokens > 1 and texts * tokens > STEP


def _grows_from(config: Any) -> int:
    """Return the length of text from which a growing rotary embedding turns otherwise."""
    scaling = config.rope_parameters or {}
    lengths = (scaling.get("original_max_position_embeddings"), config.max_position_embeddings)
    return min(int(length) for length in lengths if length is not None)


def _kept(keep: int | Tensor, texts: int, tokens: int) -> NDArray[np.int32]:
    """Return which of all texts' tokens have their logits kept, by ``logits_to_keep``."""
    own = np.arange(tokens, dtype=np.int32)
    own = own[-keep:] if isinstance(keep, int) else own[keep.numpy()]
    kept: NDArray[np.int32] = np.arange(texts, dtype=np.int32)[:, None] * tokens + own
    return kept.reshape(-1).astype(np.int32)
