"""What the fast path computes: new tokens of one sequence, into the kernels' own cache.

One new token goes through the one-token kernels, several through transformers' layers with our
attention (see :mod:`hybrid.fast.prompt`). :mod:`hybrid.fast.attach` says for which calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from cpu_experts.decoder import Decoder
from cpu_experts.formats import is_quantized
from hybrid.fast.decoder_parts import read_decoder, rotary_row, rotary_sides
from hybrid.fast.kv_cache import CacheForm, Sequence
from hybrid.fast.prompt import OnPrompt, Piece, Teller, attention_in_pieces, in_pieces
from hybrid.fast.samples import UnfitError
from hybrid.transformers_api import cache_argument, causal_output, given_cache

#: Positions whose rotary embedding is computed at a time.
_POSITIONS = 512
#: Kinds of rotary embedding whose angles depend on how long the sequence is by now.
GROWING = ("dynamic", "longrope")
#: How far a layer's two results may be apart, relative to what the layer adds. Rounding of
#: activations to int8 differs by single steps between them, which is well below this.
_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.1}
#: And with a compressed cache and quantized products: transformers' code rounds every latent to
#: int8 before keys are made of it, ours multiplies queries with the unrounded ones.
_COMPRESSED_TOLERANCE = 0.1
#: Positions that the test computes a token at; far ones show how the rotary embedding turns.
_TEST_POSITIONS = (3, 300, 1500)


class WrongError(UnfitError):
    """How far the kernels are from what transformers computes."""


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
    spent_s
        Seconds that single tokens took in the kernels since :meth:`begin_run`.
    steps
        How many they were.
    """

    spent_s, steps = 0.0, 0

    def __init__(self, model: Any, decoder: Decoder, pairs: int) -> None:
        self.decoder = decoder
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
        self._angles: list[tuple[Any, Any]] = []

    def forward(self, arguments: dict[str, Any]) -> MoeCausalLMOutputWithPast:
        """Compute the single token of a call of the model's ``forward``."""
        ids, cache = arguments["input_ids"], given_cache(arguments)
        sequence = self.packed(cache)
        given = arguments.get("position_ids")
        position = int(cache.get_seq_length() if given is None else given)
        x = self._base.embed_tokens(ids).detach().float().reshape(-1)
        if self._scale != 1.0:
            x = x * self._scale
        cos, sin = self.rotary(position)
        logits = torch.empty(1, 1, self.decoder.vocabulary)
        start_s = time.perf_counter()
        self.decoder.step(x.numpy(), cos, sin, sequence.kv, logits.numpy().reshape(-1))
        self.spent_s += time.perf_counter() - start_s
        self.steps += 1
        sequence.advance()
        return causal_output(logits.to(self._dtype), cache)

    def begin_run(self) -> None:
        """Count anew what single tokens take; the decoder counts it by layer and part."""
        self.spent_s, self.steps = 0.0, 0
        self.decoder.begin_run()

    def prompt(
        self, arguments: dict[str, Any], slow: Any, on_prompt: OnPrompt | None
    ) -> MoeCausalLMOutputWithPast:
        """Compute the tokens of a call in pieces, through ``slow``, transformers' ``forward``.

        Attention is ours, but over a compressed cache, where it is transformers', too.
        """
        ids, cache = arguments["input_ids"], given_cache(arguments)
        total = ids.shape[1]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(total)[None] + cache.get_seq_length()
        keep = arguments.get("logits_to_keep", 0)
        kept, teller = [], Teller(on_prompt, total)
        for cut, wanted in in_pieces(ids, keep):
            with self._attention(cache, positions[:, cut]):
                output = slow(
                    input_ids=ids[:, cut],
                    position_ids=positions[:, cut],
                    **cache_argument(cache),
                    use_cache=True,
                    logits_to_keep=wanted,
                )
            kept.append(output.logits)
            teller.tell(min(total, cut.stop))
        if len(kept) > 1:
            every = torch.cat(kept, dim=1)
            output.logits = every[:, -keep:] if keep else every
        return output  # type: ignore[no-any-return]

    def _attention(self, cache: DynamicCache, positions: Tensor) -> AbstractContextManager[None]:
        if self.compressed:
            return nullcontext()
        piece = Piece(self.decoder, self.packed(cache), *self.angles_at(positions))
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
        while position >= len(self._angles):
            start = len(self._angles)
            self._angles += self._turn(torch.arange(start, start + _POSITIONS)[None])
        return self._angles[position]

    def _turn(self, positions: Tensor) -> list[tuple[Any, Any]]:
        cos, sin = rotary_sides(self._base.rotary_emb, torch.empty(1), positions)
        return [
            (rotary_row(c, self._pairs), rotary_row(s, self._pairs))
            for c, s in zip(cos[0], sin[0], strict=True)
        ]


def build_decoder(model: Any, *, replace: bool) -> tuple[FastDecoder, float]:
    """Read and test a model's decoder, whose packed weights may ``replace`` the model's modules.

    Returns the decoder and how far its layers are from transformers', see :func:`_distance`.

    Raises
    ------
    UnfitError
        When the kernels compute no such decoder, or not what transformers computes.
    """
    fast = FastDecoder(model, *read_decoder(model, replace=replace))
    distance = _distance(model, fast)
    limit = _TOLERANCE.get(model.dtype, max(_TOLERANCE.values()))
    if fast.rounds_less:
        limit = max(limit, _COMPRESSED_TOLERANCE)
    if not distance <= limit:
        raise WrongError(
            f"a layer differs from transformers' by {distance:.2g}, more than {limit:.2g}"
        )
    return fast, distance


@torch.no_grad()
def _distance(model: Any, fast: FastDecoder) -> float:
    """Compute a few tokens both ways, layer by layer on the same hidden states.

    A short prompt's attention, then single tokens at several positions.

    Returns the worst layer's relative distance, a layer counting by the middle one of its
    tokens: where two experts' scores are equal but for rounding, a single token says nothing.
    The layers are compared one by one because the roundings of quantized layers add up.
    """
    config = model.config.get_text_config()
    ids = torch.arange(1, 4)[None] % config.vocab_size
    caches = [DynamicCache(config=config) for _ in range(2)]
    for cache in caches:
        with _seen_by_attention(model) as seen:
            _plain_forward(model, cache, input_ids=ids)
    kv = fast.packed(caches[1]).kv
    longest = getattr(config, "max_position_embeddings", None) or max(_TEST_POSITIONS) + 1
    distances = []
    for token, far in zip(ids[0], _TEST_POSITIONS, strict=True):
        position = min(far, longest - 1)
        states, logits = _slow_step(model, token, position, caches[0])
        row = []
        for index, (before, after) in enumerate(pairwise(states)):
            found = fast.decoder.layer_step(index, before.numpy(), *fast.rotary(position), kv)
            row.append(_relative(torch.from_numpy(found) - before, after - before))
        found = np.empty(logits.numel(), np.float32)
        fast.decoder.head_step(states[-1].numpy(), found)
        row.append(_relative(torch.from_numpy(found), logits))
        kv.advance()
        distances.append(row)
    decode = float(max(sorted(column)[1] for column in zip(*distances, strict=True)))
    return max(decode, _prompt_distance(model, fast, seen))


def _prompt_distance(model: Any, fast: FastDecoder, seen: list[tuple[Tensor, Tensor]]) -> float:
    """Compute a short prompt's attention layer by layer; returns the worst layer's distance."""
    if fast.compressed:
        return 0.0
    tokens = seen[0][0].shape[1]
    sequence = fast.packed(DynamicCache(config=model.config.get_text_config()))
    piece = Piece(fast.decoder, sequence, *fast.angles_at(torch.arange(tokens)[None]))
    distances = []
    for index, (layer, pair) in enumerate(zip(model.get_decoder().layers, seen, strict=True)):
        before, after = pair
        found = piece.attend(index, layer.self_attn, before)
        distances.append(_relative(found.float(), after.float()))
    return max(distances)


def _plain_forward(model: Any, cache: DynamicCache, **arguments: Any) -> Any:
    """Call the model past hooks of its user, who has not asked for this call."""
    return type(model).forward(model, use_cache=True, **cache_argument(cache), **arguments)


def _of_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that looks away when another thread computes with the same modules."""
    thread = threading.get_ident()

    def see(*args: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args)

    return see


@contextmanager
def _seen_by_attention(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note what goes into every layer's attention and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []

    @_of_this_thread
    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    hooks = [
        layer.self_attn.register_forward_hook(note, with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _relative(found: Tensor, wanted: Tensor) -> float:
    size = float(wanted.norm())
    distance = float((found - wanted).norm())
    return distance / size if size > 0 else distance


def _slow_step(
    model: Any, token: Tensor, position: int, cache: DynamicCache
) -> tuple[list[Tensor], Tensor]:
    """One token in transformers' code: hidden states before and after the layers, logits."""
    states: list[Tensor] = []

    @_of_this_thread
    def note_input(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        states.append(hidden.detach().float().reshape(-1).clone())

    @_of_this_thread
    def note_output(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden.detach().float().reshape(-1).clone())

    layers = model.get_decoder().layers
    hooks = [layer.register_forward_pre_hook(note_input, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(note_output))
    try:
        output = _plain_forward(
            model,
            cache,
            input_ids=token.reshape(1, 1),
            position_ids=torch.tensor([[position]]),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return states, output.logits.float().reshape(-1)
