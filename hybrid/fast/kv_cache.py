"""One cache for two readers: transformers' tensors and the kernels' strips.

A layer holds its keys and values in one of the two layouts and changes it when the other
reader comes. In a generation that happens once, after the prompt. Cropping and choosing among
the texts of a batch leave the layout as it is; whatever else transformers does with a cache
finds ordinary tensors.

The texts of a batch have the same positions: a shorter one has some in front that are not
its own, which the kernels are told at every step and do not look at.
"""

# transformers' cache classes are typed in part.
# mypy: disable-error-code="no-untyped-call, union-attr, arg-type"

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from cpu_experts.decoder.attention import LARGEST_HALF
from cpu_experts.decoder.kv import FREE, KeyValues
from hybrid.fast.state_layer import SharedState, StateShape, state_fits


@dataclass(frozen=True, eq=False)
class CacheForm:
    """What one decoder keeps of a sequence; no two decoders have the same one.

    Attributes
    ----------
    shapes
        :attr:`cpu_experts.decoder.layers.Layer.stored` of every layer: heads, their size, and
        how much of it is a compressed cache's key.
    windows
        For every layer how many positions its attention sees, 0 for all.
    states
        What every layer keeps that keeps a state, and None for the others.
    dtype
        Of the tensors that transformers' code keeps.
    """

    shapes: tuple[tuple[int, int, int], ...]
    windows: tuple[int, ...]
    states: tuple[StateShape | None, ...]
    dtype: torch.dtype

    @cached_property
    def heads(self) -> NDArray[np.int64]:
        """Heads that every layer keeps of one text."""
        return np.array([heads for heads, _, _ in self.shapes], np.int64)


class _SharedLayer(DynamicLayer):
    """A layer of a :class:`DynamicCache` whose content may lie in a :class:`KeyValues`."""

    _tensors: tuple[Any, Any]
    _sequence: Sequence
    _index: int

    @classmethod
    def adopt(cls, layer: DynamicLayer, sequence: Sequence, index: int) -> _SharedLayer:
        """Return a layer that takes over the content of an ordinary one."""
        shared = cls.__new__(cls)
        content = dict(vars(layer))
        shared._tensors = (content.pop("keys"), content.pop("values"))
        shared._sequence, shared._index = sequence, index
        vars(shared).update(content)
        return shared

    def __copy__(self) -> DynamicLayer:
        """Return an ordinary layer, which like its tensors does not see what comes later."""
        kind = DynamicSlidingWindowLayer if self.is_sliding else DynamicLayer
        layer = kind.__new__(kind)
        content = dict(vars(self))
        for own in ("_tensors", "_sequence", "_index"):
            del content[own]
        content["keys"], content["values"] = self._read()
        vars(layer).update(content)
        return layer

    @property
    def _packed(self) -> bool:
        return self._index not in self._sequence.plain

    def _read(self) -> tuple[Any, Any]:
        """Return the content as ``[texts, H, T, dim]`` tensors, wherever it lies."""
        if not self._packed:
            return self._tensors
        keys, values = self._sequence.kv.read(self._index)
        heads, _, turned = self._sequence.form.shapes[self._index]
        if turned:
            keys, values = keys[:, :, turned:], keys[:, :, :turned]
        if self.is_sliding and not _records(self):
            first = max(0, keys.shape[1] - _window(self) + 1)
            keys, values = keys[:, first:], values[:, first:]
        dtype = self._sequence.form.dtype
        return _tensor(keys, heads, dtype), _tensor(values, heads, dtype)

    def _unpack(self) -> None:
        if self._packed:
            self._tensors = self._read()
            self._sequence.plain.add(self._index)

    @property
    def keys(self) -> Any:
        self._unpack()
        return self._tensors[0]

    @keys.setter
    def keys(self, value: Any) -> None:
        self._unpack()
        self._tensors = (value, self._tensors[1])

    @property
    def values(self) -> Any:
        self._unpack()
        return self._tensors[1]

    @values.setter
    def values(self, value: Any) -> None:
        self._unpack()
        self._tensors = (self._tensors[0], value)

    def pack(self, texts: int) -> None:
        """Move the content, of so many texts, into the strips.

        A compressed cache has a turned key beside its latent, which are the tensors' values and
        keys; the strips hold both, key first, as keys and as values.
        """
        form = self._sequence.form
        heads, dim, turned = form.shapes[self._index]
        if not self.is_initialized:
            self.lazy_initialization(
                torch.empty(texts, heads, 0, dim - turned, dtype=form.dtype), torch.empty(0)
            )
        keys, values = self._tensors
        if keys.numel() == 0:
            keys = values = torch.empty(texts, heads, 0, dim)
        elif turned:
            keys = values = torch.cat((values, keys), dim=-1)
        self._sequence.kv.store(
            self._index, *(x.flatten(0, 1).float().contiguous().numpy() for x in (keys, values))
        )
        self._tensors = (None, None)
        self._sequence.plain.discard(self._index)
        if _records(self):  # whoever recorded may go back to all of it
            self._sequence.kv.held[self._index] = min(_window(self) - 1, keys.shape[2])

    def fits(self, form: CacheForm, texts: int) -> bool:
        """Whether a decoder of this form could have written the content, of so many texts."""
        index = self._index
        if self._packed:
            mine, heads = self._sequence.form, int(self._sequence.kv.heads[index])
            same = (mine.shapes[index], mine.dtype) == (form.shapes[index], form.dtype)
            same = same and heads == texts * form.shapes[index][0]
            return same and _fits_window(self, form.windows[index])
        return _fits(self, self._tensors, form, index, texts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these texts, in this order."""
        if self._packed:
            self._select(beam_idx)
        else:
            super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts."""
        if self._packed:
            self._select(indices)
        else:
            super().batch_select_indices(indices)

    def _select(self, chosen: Tensor) -> None:
        kv, heads = self._sequence.kv, self._sequence.form.shapes[self._index][0]
        own = np.arange(kv.heads[self._index]).reshape(-1, heads)
        kv.select(self._index, own[chosen.numpy()].reshape(-1))
        self._sequence.count_texts()


class _SharedFullLayer(_SharedLayer):
    def get_seq_length(self) -> int:
        if self._packed:
            return self._sequence.kv.length(self._index)
        return super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        if self._packed and tokens_to_remove <= 0:
            self._sequence.kv.drop(self._index, -tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


class _SharedSlidingLayer(_SharedLayer, DynamicSlidingWindowLayer):
    def crop(self, tokens_to_remove: int) -> None:
        within = self.cumulative_length < self.sliding_window
        if self._packed and tokens_to_remove <= 0 and (within or self.record_past):
            kv, index = self._sequence.kv, self._index
            kv.drop(index, -tokens_to_remove)
            self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
            self.hold()
        else:
            super().crop(tokens_to_remove)

    def hold(self) -> None:
        """Let the strips keep what can be gone back to from here on, if somebody wants to."""
        kv, index = self._sequence.kv, self._index
        kv.held[index] = kv.length(index) if self.record_past else FREE


class Sequence:
    """The cache of a text, or of a batch of them, as the kernels use it.

    Attributes
    ----------
    kv
        Keys and values of the layers that are packed.
    form
        Of the decoder that wrote them last.
    texts
        How many it is of.
    plain
        The layers whose content lies in tensors.
    """

    def __init__(self, cache: DynamicCache, form: CacheForm) -> None:
        layers: list[Any] = cache.layers
        if not layers:  # a cache that was made without a config
            layers += [DynamicLayer() for _ in form.shapes]
        # Not the decoder's windows: transformers keeps everything in layers that do not slide.
        self.kv = KeyValues([_window(layer) for layer in layers])
        self.form, self.texts = form, 0
        self.plain = set(range(len(layers)))
        for index, layer in enumerate(layers):
            kind: Any = _SharedSlidingLayer if _window(layer) else _SharedFullLayer
            if type(layer) is LinearAttentionLayer:
                kind = SharedState
            layers[index] = kind.adopt(layer, self, index)
        self._layers = layers
        self._sliding = [layer for layer in layers if layer.is_sliding]

    @classmethod
    def of(cls, cache: DynamicCache, form: CacheForm, texts: int) -> Sequence:
        """Return a cache that :func:`can_share` as a decoder's sequence, all of it in strips."""
        sequence = _found(cache) or cls(cache, form)
        sequence.form = form
        if sequence.plain:
            for index in sorted(sequence.plain):
                sequence._layers[index].pack(texts)
            sequence.count_texts()
        for layer in sequence._sliding:
            if layer.record_past != (sequence.kv.held[layer._index] != FREE):
                layer.hold()
        return sequence

    def count_texts(self) -> None:
        """Note of how many texts all layers are; of none while they are of different numbers."""
        first = int(self.kv.heads[0] // self.form.heads[0])
        self.texts = first if np.array_equal(self.kv.heads, first * self.form.heads) else 0

    def owns(self, layers: list[Any]) -> bool:
        """Whether these are the layers that it was made of."""
        return layers is self._layers and all(
            isinstance(layer, _SharedLayer | SharedState)
            and layer._sequence is self
            and layer._index == index
            for index, layer in enumerate(layers)
        )

    def fits(self, form: CacheForm, texts: int) -> bool:
        """Whether a decoder of this form could have written all of it, as so many texts."""
        if self.form is form and not self.plain:  # it has: the usual case, at every token
            return self.texts == texts
        return all(layer.fits(form, texts) for layer in self._layers)

    def advance(self, count: int = 1) -> None:
        """Tell the layers of the tokens that a decode step has added to each text."""
        for layer in self._sliding:
            layer.cumulative_length += count

    def left_the_range(self) -> bool:
        """Whether what was written since the last call had numbers beyond half precision."""
        found = self.kv.beyond
        if found:
            self.kv.beyond = False
        return found

    def take_back(self, count: int) -> None:
        """Forget the last ``count`` tokens, all of which the kernels have added."""
        for index, layer in enumerate(self._layers):
            self.kv.drop(index, count)
            if layer.is_sliding:
                layer.cumulative_length -= count

    def advance_layer(self, index: int, count: int) -> None:
        """Tell a layer of tokens that :meth:`Decoder.attend` has added."""
        layer = self._layers[index]
        if layer.is_sliding:
            layer.cumulative_length += count


def goes_on(cache: DynamicCache, form: CacheForm) -> bool:
    """Whether the decoder of this form, and no one else, has computed a cache's last token."""
    sequence = _found(cache)
    return sequence is not None and sequence.form is form and not sequence.plain


def can_share(cache: Any, form: CacheForm, texts: int = 1) -> bool:
    """Whether a cache is of so many texts, and one that a decoder's kernels can take over.

    It is where its layers are ordinary ones and hold what the decoder itself would have written
    into them: as many heads of the same size, in its dtype, and all positions that it looks at.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    layers: list[Any] = cache.layers
    if not layers:
        return cache.layer_class_to_replicate is DynamicLayer and not any(form.states)
    if len(layers) != len(form.shapes):
        return False
    sequence = _found(cache)
    if sequence is not None:
        return sequence.owns(layers) and sequence.fits(form, texts)
    return all(_takes(layer, form, index, texts) for index, layer in enumerate(layers))


def _takes(layer: Any, form: CacheForm, index: int, texts: int) -> bool:
    """Whether the kernels can take over an ordinary layer of so many texts."""
    if type(layer) is LinearAttentionLayer:
        return state_fits(layer, (layer.conv_states, layer.recurrent_states), form, index, texts)
    ordinary = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    return ordinary and _fits(layer, (layer.keys, layer.values), form, index, texts)


def _found(cache: DynamicCache) -> Sequence | None:
    """Return the sequence that a cache's layers belong to, if they do."""
    first = cache.layers[0] if cache.layers else None
    return first._sequence if isinstance(first, _SharedLayer | SharedState) else None


def _fits_window(layer: Any, window: int) -> bool:
    """Whether a layer keeps all positions that attention through ``window`` sees."""
    kept = _window(layer)
    return not kept or kept == window


def _fits(layer: Any, tensors: tuple[Any, Any], form: CacheForm, index: int, texts: int) -> bool:
    """Whether a decoder of this form could have written ``tensors`` of so many texts into a layer.

    It writes none that are beyond half precision.
    """
    if form.states[index] is not None or not _fits_window(layer, form.windows[index]):
        return False
    if not layer.is_initialized:
        return True
    heads, dim, turned = form.shapes[index]
    sizes = (dim - turned, turned or dim)
    return all(
        (x.device.type, x.dtype) == ("cpu", form.dtype)
        # transformers begins with a tensor of no shape.
        and (x.shape == (0,) or (x.ndim, *x.shape[:2], x.shape[-1]) == (4, texts, heads, size))
        and (x.numel() == 0 or bool(x.abs().amax() <= float(LARGEST_HALF)))
        for x, size in zip(tensors, sizes, strict=True)
    )


def _records(layer: Any) -> bool:
    """Whether a layer keeps what has left its window, because it may go back there."""
    return bool(getattr(layer, "record_past", False))


def _window(layer: Any) -> int:
    return int(getattr(layer, "sliding_window", 0))


def _tensor(array: np.ndarray, heads: int, dtype: torch.dtype) -> Tensor:
    """Return ``[texts * heads, T, dim]`` as ``[texts, heads, T, dim]``."""
    whole = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return whole.reshape(array.shape[0] // heads, heads, *array.shape[1:])
