"""A layer of one cache for two readers (:mod:`hybrid.fast.kv_cache`) that keeps a state.

Gated delta nets keep the last inputs of a convolution and a memory, of one size whatever the text's
length. The kernels lay the inputs out by tap, and keep what was before the last step as well.
"""

# transformers' cache classes are typed in part.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


@dataclass(frozen=True)
class StateShape:
    """What a gated delta net keeps of a text: ``[taps, channels]`` and ``[heads, key, value]``."""

    taps: int
    channels: int
    heads: int
    key_dim: int
    value_dim: int


class SharedState(LinearAttentionLayer):
    """A layer of a cache whose state may lie in a :class:`~cpu_experts.decoder.kv.KeyValues`."""

    is_sliding = False
    _inputs: dict[int, Any]
    _memories: dict[int, Any]
    _sequence: Any
    _index: int

    @classmethod
    def adopt(cls, layer: LinearAttentionLayer, sequence: Any, index: int) -> SharedState:
        """Return a layer that takes over the content of an ordinary one."""
        shared = cls.__new__(cls)
        content = dict(vars(layer))
        shared._inputs, shared._memories = (
            content.pop("conv_states"),
            content.pop("recurrent_states"),
        )
        shared._sequence, shared._index = sequence, index
        vars(shared).update(content)
        return shared

    def __copy__(self) -> LinearAttentionLayer:
        """Return an ordinary layer; what comes later is written into memory of its own."""
        self._unpack()
        layer = LinearAttentionLayer.__new__(LinearAttentionLayer)
        content = dict(vars(self))
        for own in ("_sequence", "_index"):
            del content[own]
        content["conv_states"] = content.pop("_inputs")
        content["recurrent_states"] = content.pop("_memories")
        for name, value in content.items():
            content[name] = dict(value) if isinstance(value, dict) else value
        vars(layer).update(content)
        return layer

    @property
    def _packed(self) -> bool:
        return self._index not in self._sequence.plain

    def _unpack(self) -> None:
        """Bring the state into tensors, unless it is there."""
        if not self._packed:
            return
        inputs, memory = self._sequence.kv.read_memory(self._index)
        dtype = self._sequence.form.dtype
        self._inputs = {0: torch.from_numpy(inputs).transpose(1, 2).to(dtype).contiguous()}
        self._memories = {0: torch.from_numpy(memory)}
        self._sequence.plain.add(self._index)

    @property
    def conv_states(self) -> dict[int, Any]:
        """The last inputs of the convolution, ``[texts, channels, taps]``."""
        self._unpack()
        return self._inputs

    @conv_states.setter
    def conv_states(self, value: dict[int, Any]) -> None:
        self._unpack()
        self._inputs = value

    @property
    def recurrent_states(self) -> dict[int, Any]:
        """The memories, ``[texts, heads, key_dim, value_dim]`` float32."""
        self._unpack()
        return self._memories

    @recurrent_states.setter
    def recurrent_states(self, value: dict[int, Any]) -> None:
        self._unpack()
        self._memories = value

    def pack(self, texts: int) -> None:
        """Move the state, of so many texts, to where the kernels read and write it."""
        form = self._sequence.form
        shape: StateShape = form.states[self._index]
        inputs = torch.zeros(texts, shape.taps, shape.channels)
        memory = torch.zeros(texts, shape.heads, shape.key_dim, shape.value_dim)
        if self.is_recurrent_states_initialized[0]:
            inputs = self._inputs[0].float().transpose(1, 2)
            memory = self._memories[0]
        pair = (np.ascontiguousarray(x.detach().numpy()) for x in (inputs, memory))
        self._sequence.kv.store_memory(self._index, *pair)
        self._inputs, self._memories = {0: None}, {0: None}
        for told in (self.is_conv_states_initialized, self.is_recurrent_states_initialized):
            told[0] = True
        self.has_previous_state[0], self.conv_kernel_size[0] = True, shape.taps
        vars(self).update(dtype=form.dtype, device=torch.device("cpu"))
        self._sequence.plain.discard(self._index)

    def fits(self, form: Any, texts: int) -> bool:
        """Whether a decoder of this form could have written the state, of so many texts."""
        shape = form.states[self._index]
        if shape is None:
            return False
        if self._packed:
            mine, heads = self._sequence.form, int(self._sequence.kv.heads[self._index])
            same = (mine.states[self._index], mine.dtype) == (shape, form.dtype)
            return same and heads == texts * shape.heads and not self.record_past
        return state_fits(self, (self._inputs, self._memories), form, self._index, texts)


def state_fits(layer: Any, content: tuple[Any, Any], form: Any, index: int, texts: int) -> bool:
    """Whether a decoder of this form could have written the dicts of tensors of a layer."""
    shape, (inputs, memories) = form.states[index], content
    if shape is None or layer.number_of_states != 1 or layer.record_past:
        return False
    begun = layer.is_recurrent_states_initialized[0]
    if begun != layer.is_conv_states_initialized[0]:
        return False
    return not begun or (
        _is(inputs[0], (texts, shape.channels, shape.taps), form.dtype)
        and _is(memories[0], (texts, shape.heads, shape.key_dim, shape.value_dim), torch.float32)
    )


def _is(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return (x.device.type, tuple(x.shape), x.dtype) == ("cpu", shape, dtype)
