"""The test that a decoder passes before it is used: a few tokens, by it and by transformers' code.

Single tokens are computed, a step of several, and the attention of a prompt.

The reference is transformers' code in float32 with the model's weights as they are, layer by layer
on the hidden states of the model's own pass: roundings of quantized layers would add up over
several. A result in bfloat16 would be no reference. Trained models have a few hidden values in
the thousands ("massive activations", arXiv 2402.17762), and there a step of bfloat16 is larger
than what a layer adds to the stream. For the same reason a layer counts by its ordinary channels,
too: a mistake in them must not hide behind a massive one.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from cpu_experts.decoder.attention import LARGEST_HALF
from cpu_experts.decoder.kv import KeyValues
from hybrid.anatomy.samples import WrongError
from hybrid.anatomy.widened import widened
from hybrid.fast.decode import FastDecoder
from hybrid.fast.decoder_parts import mixer_of, read_decoder
from hybrid.fast.prompt import Piece
from hybrid.grafts import hook_after
from hybrid.transformers_api import cache_argument

#: How far the kernels may be from float32, relative to what a layer adds. Roundings of
#: activations to int8 differ by single steps between the two, which is well below this.
_TOLERANCE = 0.02
#: And with a compressed cache and quantized products: transformers' code rounds every latent to
#: int8 before keys are made of it, ours multiplies queries with the unrounded ones.
_COMPRESSED_TOLERANCE = 0.1
#: How far logits may be from those that the model itself computes in a type that rounds more: they
#: show what lies between the head and them, and the head is compared with float32 besides.
_LOGITS_TOLERANCE = 0.1
#: How far a single token may be, whatever the others are: another expert of nearly the same score
#: changes less.
_TOKEN_TOLERANCE = 2.0
#: Channels beyond so many times the median one are massive.
_MASSIVE = 30.0
#: Rows of a head that are copied at a time.
_ROWS = 4096
_BEYOND = "keys or values are beyond half precision, which the kernels' cache is in"
#: Positions that a token is computed at; far ones show how the rotary embedding turns.
_POSITIONS = (3, 300, 1500)


class _Call(NamedTuple):
    """One call of a module: what it was given, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def hidden(self) -> Tensor:
        """The stream that a layer or its attention was given."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    @property
    def made(self) -> Tensor:
        """The stream that it returned."""
        return _stream(self.result)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of the model.

    Parameters
    ----------
    cache
        What it wrote into.
    layers, attention
        The calls of its parts.
    angles
        Every result of its rotary embedding, beside the same in float32.
    logits
        ``[1, T, V]``.
    """

    cache: DynamicCache
    layers: list[_Call]
    attention: list[_Call]
    angles: list[tuple[Any, Any]]
    logits: Tensor

    def again(self, call: _Call, twin: Any, cache: DynamicCache) -> Tensor:
        """Return what a part's twin makes of a call of the part in float32, with ``cache``."""

        def widen(value: Any) -> Any:
            for old, new in [(self.cache, cache), *self.angles]:
                if value is old:
                    return new
            return tuple(map(widen, value)) if type(value) is tuple else _wide(value)

        kwargs = {name: widen(value) for name, value in call.kwargs.items()}
        return _stream(twin(*map(widen, call.args), **kwargs)).float()


def build_decoder(model: Any, *, replace: bool) -> tuple[FastDecoder, float]:
    """Read and test a model's decoder, whose packed weights may ``replace`` the model's modules.

    Returns the decoder and how far its parts are from transformers' at most.

    Raises
    ------
    UnfitError
        When the kernels compute no such decoder, or not what transformers computes.
    """
    fast = FastDecoder(model, *read_decoder(model, replace=replace))
    return fast, check_decoder(model, fast)


def check_decoder(model: Any, fast: FastDecoder) -> float:
    """Compute a short prompt and single tokens at several positions both ways.

    Returns
    -------
    The largest relative distance of a part, a layer counting by the middle one of its tokens:
    where two experts' scores are equal but for rounding, a single token says nothing.

    Raises
    ------
    WrongError
        When a part is further from the reference than it may be.
    """
    with torch.no_grad():
        return max(_Test(model, fast).distances())


class _Test:
    def __init__(self, model: Any, fast: FastDecoder) -> None:
        self._model, self._fast = model, fast
        self._base = model.get_decoder()
        self._config = model.config.get_text_config()
        self._limit = _COMPRESSED_TOLERANCE if fast.rounds_less else _TOLERANCE
        #: A cache that holds the reference's keys and values of the prompt, for the kernels.
        self._prompt = self._new_cache()
        longest = getattr(self._config, "max_position_embeddings", None) or max(_POSITIONS) + 1
        self._positions = [min(position, longest - 1) for position in _POSITIONS]

    def distances(self) -> Iterator[float]:
        """Yield every part's distance, none of which is beyond its limit."""
        ids = torch.arange(1, len(self._positions) + 1)[None] % self._config.vocab_size
        cache = self._new_cache()
        passes = [self._record(cache, input_ids=ids)]
        for token, position in zip(ids[0], self._positions, strict=True):
            at = torch.tensor([[position]])
            passes.append(self._record(cache, input_ids=token.reshape(1, 1), position_ids=at))
        attend = self._piece(ids.shape[1]) if self._fast.attends else None
        reference = self._new_cache()
        expected = []
        several = self._fast.packed(self._new_cache()).kv
        for index, layer in enumerate(self._base.layers):
            twin = widened(layer)
            if attend is not None:
                yield self._attention(index, twin, passes[0], attend)
            first, *others = self._additions(index, twin, passes, reference)
            yield self._step(index, passes[0].layers[index].hidden, first, several)
            expected.append(others)
        if several.beyond:
            raise WrongError(_BEYOND)
        yield from self._tokens(passes[1:], expected)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._config)

    def _piece(self, tokens: int) -> Piece:
        angles = self._fast.angles_at(torch.arange(tokens)[None])
        return Piece(self._fast.decoder, self._fast.packed(self._new_cache()), *angles)

    def _attention(self, index: int, twin: Any, given: _Pass, piece: Piece) -> float:
        """The distance of a prompt's attention, its projections in float32, too."""
        call = given.attention[index]
        exact = given.again(call, twin.self_attn, self._new_cache())
        found = piece.attend(index, twin.self_attn, call.hidden.float())
        if piece.beyond:
            raise WrongError(_BEYOND)
        return _within(f"the attention of layer {index}", _relative(found, exact), self._limit)

    def _additions(
        self, index: int, twin: Any, passes: list[_Pass], reference: DynamicCache
    ) -> Iterator[Tensor]:
        """What a layer adds to the stream of the prompt, and then of each single token."""
        for given in passes:
            call = given.layers[index]
            after = given.again(call, twin, reference)
            if given is passes[0]:
                self._prompt.layers[index] = copy.deepcopy(reference.layers[index])
                yield after[0] - call.hidden.float()[0]
            else:
                yield (after - call.hidden.float()).reshape(-1)

    def _step(self, index: int, hidden: Tensor, expected: Tensor, kv: KeyValues) -> float:
        """The distance of a layer for several tokens in a step."""
        part, before = f"a step through layer {index}", hidden.float()[0].contiguous()
        angles = self._fast.angles_at(torch.arange(len(before))[None])
        found = self._fast.decoder.layer_tokens(index, before.numpy(), *angles, kv)
        row = list(map(_relative, torch.from_numpy(found) - before, expected))
        _within(part, max(row), _TOKEN_TOLERANCE)
        return _within(part, median(row), self._limit)

    def _tokens(self, steps: list[_Pass], expected: list[list[Tensor]]) -> Iterator[float]:
        """The distances of the layers and of the head for single tokens."""
        _check_range(self._prompt)
        kv = self._fast.packed(self._prompt).kv
        norm, rows, theirs, heads = widened(self._base.norm), [], [], []
        for at, (step, position) in enumerate(zip(steps, self._positions, strict=True)):
            angles, row = self._fast.rotary(position), []
            for index, call in enumerate(step.layers):
                before = call.hidden.float().reshape(-1)
                found = self._fast.decoder.layer_step(index, before.numpy(), *angles, kv)
                row.append(_relative(torch.from_numpy(found) - before, expected[index][at]))
            logits = np.empty(step.logits.numel(), np.float32)
            last = step.layers[-1].made.float().reshape(-1)
            self._fast.decoder.head_step(last.numpy(), logits)
            made = torch.from_numpy(logits)
            exact = _logits(self._model.lm_head, norm(last)) * self._fast.decoder.scale
            row.append(_relative(made, exact))
            heads.append((last, exact))
            theirs.append(_relative(made, step.logits.float().reshape(-1)))
            kv.advance()
            rows.append(row)
        if kv.beyond:
            raise WrongError(_BEYOND)
        parts = [*(f"layer {index}" for index in range(len(expected))), "the head"]
        for part, column in zip(parts, zip(*rows, strict=True), strict=True):
            _within(part, max(column), _TOKEN_TOLERANCE)
            yield _within(part, median(column), self._limit)
        yield self._head(*map(torch.stack, zip(*heads, strict=True)))
        _within("the head, beside all", max(theirs), max(self._limit, _LOGITS_TOLERANCE))

    def _head(self, last: Tensor, exact: Tensor) -> float:
        """The distance of the head for several tokens in a step."""
        logits = np.empty(exact.shape, np.float32)
        self._fast.decoder.head_tokens(last.numpy(), logits)
        distances = map(_relative, torch.from_numpy(logits), exact)
        return _within("the head in a step", max(distances), self._limit)

    def _record(self, cache: DynamicCache, **arguments: Any) -> _Pass:
        """Run the model past hooks of its user, who has not asked for this call."""
        calls: dict[str, list[_Call]] = {"layers": [], "attention": [], "rotary": []}
        places = [("rotary", self._base.rotary_emb)]
        for layer in self._base.layers:
            places += [("layers", layer), ("attention", mixer_of(layer))]
        with _noting(calls, places):
            output = type(self._model).forward(
                self._model, use_cache=True, **cache_argument(cache), **arguments
            )
        angles = [(call.result, self._exact_angles(call)) for call in calls["rotary"]]
        return _Pass(cache, calls["layers"], calls["attention"], angles, output.logits)

    def _exact_angles(self, call: _Call) -> Any:
        kwargs = {name: _wide(value) for name, value in call.kwargs.items()}
        return self._base.rotary_emb(*map(_wide, call.args), **kwargs)


@contextmanager
def _noting(calls: dict[str, list[_Call]], places: list[tuple[str, Any]]) -> Iterator[None]:
    """Note the calls of modules by this thread: another may compute with them meanwhile."""
    thread = threading.get_ident()

    def hook(kind: str) -> Callable[..., None]:
        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                calls[kind].append(_Call(args, kwargs, output))

        return note

    hooks = [
        hook_after(module, hook(kind), "its calls are noted", with_kwargs=True)
        for kind, module in places
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.undo()


def _stream(result: Any) -> Tensor:
    """The stream among what a layer or its attention returned."""
    stream: Tensor = result[0] if isinstance(result, tuple) else result
    return stream


def _logits(head: Any, x: Tensor) -> Tensor:
    """What a head makes of ``x`` in float32; a head may be too large to be copied at once."""
    if type(head) is not nn.Linear:
        logits: Tensor = widened(head)(x).float()
        return logits
    rows = [linear(x, some.float()) for some in torch.split(head.weight, _ROWS)]
    return torch.cat(rows) if head.bias is None else torch.cat(rows) + head.bias.float()


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_range(cache: DynamicCache) -> None:
    """Raise WrongError where the reference's keys or values are none that the kernels keep."""
    layers: list[Any] = cache.layers
    kept = [layer for layer in layers if type(layer) is not LinearAttentionLayer]
    for tensor in (tensor for layer in kept for tensor in (layer.keys, layer.values)):
        if not bool((tensor.abs() <= float(LARGEST_HALF)).all()):
            raise WrongError(_BEYOND)


def _relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two results relative to ``expected``: of all channels or of ordinary ones."""
    sizes = expected.abs()
    typical = sizes.median()
    distance = _ratio(found - expected, expected)
    if typical > 0:
        ordinary = sizes <= _MASSIVE * typical
        distance = max(distance, _ratio((found - expected)[ordinary], expected[ordinary]))
    return distance


def _ratio(apart: Tensor, expected: Tensor) -> float:
    size, distance = float(expected.norm()), float(apart.norm())
    distance = distance / size if size > 0 else distance
    return distance if math.isfinite(distance) else math.inf  # which unlike NaN has an order


def _within(part: str, distance: float, limit: float) -> float:
    """Return a part's distance, or raise WrongError where it is beyond the limit."""
    if distance > limit:
        raise WrongError(
            f"{part} differs from transformers' by {distance:.2g}, more than {limit:.2g}"
        )
    return distance
