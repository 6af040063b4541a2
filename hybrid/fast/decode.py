"""What the fast path computes: new tokens of one sequence, into the kernels' own cache.

One new token goes through the one-token kernels, several through transformers' layers with our
attention (see :mod:`hybrid.fast.prompt`). :mod:`hybrid.fast.attach` says for which calls.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from cpu_experts.decoder.decoder import Decoder
from hybrid.fast.decoder_parts import rotary_row, rotary_sides
from hybrid.fast.kv_cache import CacheForm, Sequence
from hybrid.fast.prompt import OnPrompt, Piece, Teller, attention_in_pieces, in_pieces
from hybrid.formats.registry import is_quantized
from hybrid.stopwatch import Stopwatch
from hybrid.transformers_api import cache_argument, causal_output, given_cache

#: Positions whose rotary embedding is computed at a time.
_POSITIONS = 512
#: Kinds of rotary embedding whose angles depend on how long the sequence is by now.
GROWING = ("dynamic", "longrope")


class FastDecoder:
    """New tokens of one sequence.

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
    """

    def __init__(self, model: Any, decoder: Decoder, pairs: int) -> None:
        self.decoder = decoder
        self.watch = Stopwatch()
        self._base = model.get_decoder()
        self._dtype = model.dtype
        self._pairs = pairs
        self._scale = float(getattr(self._base, "embedding_multiplier", 1.0))
        self.form = CacheForm(
            shapes=tuple(layer.stored for layer in decoder.layers),
            windows=tuple(layer.window for layer in decoder.layers),
            dtype=model.dtype,
        )
        latents = [layer.latent for layer in decoder.layers if layer.latent is not None]
        self.compressed = bool(latents)
        self.rounds_less = any(is_quantized(latent.kv_b.format) for latent in latents)
        self._growing = getattr(self._base.rotary_emb, "rope_type", "default") in GROWING
        self._grows_from = _grows_from(model.config.get_text_config()) if self._growing else None
        self._angles: dict[int, list[tuple[Any, Any]]] = {}

    def next_token(self, ids: Tensor, position: int, cache: DynamicCache, logits: Tensor) -> bool:
        """Compute the token ``ids`` ``[1, 1]`` at a position and write its ``logits`` ``[V]``.

        Returns whether it is done: a cache is as before where numbers leave the range of the
        kernels' cache.
        """
        sequence = self.packed(cache)
        x = self._base.embed_tokens(ids).detach().float().reshape(-1)
        if self._scale != 1.0:
            x = x * self._scale
        cos, sin = self.rotary(position)
        with self.watch:
            self.decoder.step(x.numpy(), cos, sin, sequence.kv, logits.numpy())
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

    def begin_run(self) -> None:
        """Count anew what single tokens take; the decoder counts it by layer and part."""
        self.watch.reset()
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
        kept, teller, ours = [], Teller(on_prompt, total), not self.compressed
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
        return attention_in_pieces(self._base.layers, piece)

    def angles_at(self, positions: Tensor) -> tuple[Any, Any]:
        """Cosines and sines of positions ``[1, T]``, ``[T, pairs]`` float32 each."""
        cos, sin = (
            side.detach().float().reshape(positions.shape[1], -1)[:, : self._pairs].contiguous()
            for side in rotary_sides(self._base.rotary_emb, torch.empty(1), positions)
        )
        return cos.numpy(), sin.numpy()

    def packed(self, cache: DynamicCache) -> Sequence:
        """Return the sequence of a cache, its content in the kernels' layout."""
        return Sequence.of(cache, self.form)

    def rotary(self, position: int) -> tuple[Any, Any]:
        """Return cosines and sines of a position, ``[pairs]`` float32 each."""
        if self._growing:
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


def _grows_from(config: Any) -> int:
    """Return the length of text from which a growing rotary embedding turns otherwise."""
    scaling = config.rope_parameters or {}
    lengths = (scaling.get("original_max_position_embeddings"), config.max_position_embeddings)
    return min(int(length) for length in lengths if length is not None)
