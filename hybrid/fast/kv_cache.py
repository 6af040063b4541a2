"""One cache for two readers: transformers' tensors and the one-token kernels' strips.

A layer holds its keys and values in one of the two layouts and changes it when the other
reader comes. In a generation that happens once, after the prompt; whatever else transformers
does with a cache (reordering, repeating, cropping) finds ordinary tensors.
"""

# transformers' cache classes are typed in part.
# mypy: disable-error-code="no-untyped-call, union-attr, arg-type"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cpu_experts.kv import KeyValues

_ATTRIBUTE = "_hybrid_sequence"


class _SharedLayer(DynamicLayer):
    """A layer of a :class:`DynamicCache` whose content may lie in a :class:`KeyValues`."""

    _tensors: tuple[Any, Any] = (None, None)
    _sequence: Sequence | None = None
    _index = 0
    _key = 0

    @property
    def _packed(self) -> bool:
        return self._sequence is not None and self._index not in self._sequence.plain

    def _unpack(self) -> None:
        if self._sequence is None or not self._packed:
            return
        self._tensors = self._sequence.read(self._index, self.dtype)
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

    def adopt(self, layer: DynamicLayer, sequence: Sequence, index: int) -> None:
        """Take over the content of an ordinary layer."""
        content = dict(vars(layer))
        self._tensors = (content.pop("keys"), content.pop("values"))
        self.__dict__.update(content)
        self._sequence, self._index = sequence, index

    def pack(self, heads: int, dim: int, key: int, dtype: torch.dtype) -> None:
        """Move the content into the strips.

        A compressed cache has ``key`` numbers of a turned key beside its latent, which are the
        tensors' values and keys; the strips hold both, key first, as keys and as values.
        """
        assert self._sequence is not None
        self._key = key
        if not self.is_initialized:
            self.lazy_initialization(
                torch.empty(1, heads, 0, dim - key, dtype=dtype), torch.empty(0)
            )
        keys, values = self._tensors
        if keys.numel() == 0:
            keys = values = torch.empty(1, heads, 0, dim)
        elif key:
            keys = values = torch.cat((values, keys), dim=-1)
        self._sequence.kv.store(
            self._index, *(x[0].float().contiguous().numpy() for x in (keys, values))
        )
        self._tensors = (None, None)
        self._sequence.plain.discard(self._index)


class _SharedFullLayer(_SharedLayer):
    def get_seq_length(self) -> int:
        if self._packed and self._sequence is not None:
            return self._sequence.kv.length(self._index)
        return super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        if self._packed and self._sequence is not None and tokens_to_remove <= 0:
            self._sequence.kv.drop(self._index, -tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


class _SharedSlidingLayer(_SharedLayer, DynamicSlidingWindowLayer):
    pass


class Sequence:
    """The cache of one sequence as the one-token kernels use it.

    Attributes
    ----------
    kv
        Keys and values of the layers that are packed.
    plain
        The layers whose content lies in tensors.
    """

    def __init__(self, cache: DynamicCache, kv: KeyValues) -> None:
        self.kv = kv
        self.plain = set(range(len(cache.layers)))
        for index, layer in enumerate(cache.layers):
            shared: _SharedLayer
            if isinstance(layer, DynamicSlidingWindowLayer):
                shared = _SharedSlidingLayer(layer.sliding_window)
            else:
                shared = _SharedFullLayer()
            shared.adopt(layer, self, index)
            cache.layers[index] = shared
        self._layers: list[Any] = cache.layers
        self._sliding: list[Any] = [layer for layer in cache.layers if layer.is_sliding]

    @classmethod
    def of(cls, cache: DynamicCache, new: Any) -> Sequence:
        """Return the sequence of a cache, made by ``new`` when it has none."""
        found: Sequence | None = getattr(cache, _ATTRIBUTE, None)
        if found is None or found._layers is not cache.layers:
            found = cls(cache, new())
            setattr(cache, _ATTRIBUTE, found)
        return found

    def pack(self, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
        """Move everything into the strips; ``shapes`` are :attr:`Layer.stored` of all layers."""
        for index in sorted(self.plain):
            self._layers[index].pack(*shapes[index], dtype)

    def advance(self) -> None:
        """Tell the layers of the token that a decode step has added."""
        for layer in self._sliding:
            layer.cumulative_length += 1

    def advance_layer(self, index: int, count: int) -> None:
        """Tell a layer of tokens that :meth:`Decoder.attend` has added."""
        layer = self._layers[index]
        if layer.is_sliding:
            layer.cumulative_length += count

    def read(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a layer's content as ``[1, H, T, dim]`` tensors."""
        keys, values = self.kv.read(index)
        layer = self._layers[index]
        if layer._key:
            keys, values = keys[:, :, layer._key :], keys[:, :, : layer._key]
        if layer.is_sliding:
            keys, values = (
                x[:, max(0, x.shape[1] - layer.sliding_window + 1) :] for x in (keys, values)
            )
        return (_tensor(keys, dtype), _tensor(values, dtype))


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None].to(dtype)


def is_shared(cache: DynamicCache) -> bool:
    """Whether the kernels have taken a cache over before."""
    return getattr(cache, _ATTRIBUTE, None) is not None


def can_share(cache: Any, layers: int) -> bool:
    """Whether a cache is one sequence in ordinary layers, so that the kernels can take it over."""
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) != layers:
        return False
    if getattr(cache, _ATTRIBUTE, None) is not None:
        shared: list[Any] = cache.layers
        return all(
            layer._packed or layer._tensors[0] is None or _is_single(layer._tensors[0])
            for layer in shared
        ) and not any(getattr(layer, "record_past", False) for layer in shared)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(
        type(layer) in plain
        and not getattr(layer, "record_past", False)
        and (layer.keys is None or _is_single(layer.keys))
        for layer in cache.layers
    )


def _is_single(keys: Tensor) -> bool:
    return keys.device.type == "cpu" and (keys.numel() == 0 or keys.shape[0] == 1)
