"""Keys and values of one sequence, or the state of its layers, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_experts.checks import check_matrix
from cpu_experts.decoder.attention import pack_past
from cpu_experts.decoder.records import STATE
from cpu_experts.jit.workers import LOCK
from hybrid.formats.errors import ShapeError
from hybrid.formats.strips import F32, TILE, pad

#: Positions by which buffers grow at least.
_STEP = 256
#: A length that no layer reaches.
FREE = 1 << 40


@dataclass
class _Layer:
    """``keys [H, capacity / 16, dim, 16]``, ``values [H, strips, capacity, 16]``, as bits."""

    keys: NDArray[np.uint16]
    values: NDArray[np.uint16]
    dim: int


@dataclass
class _Memory:
    """Twice ``inputs [texts, taps, channels]`` and ``memory [texts, heads, key, value]``."""

    inputs: F32
    memory: F32

    def point(self, state: Any, now: int) -> None:
        """Tell the kernels that what there is lies in the first or second of the two."""
        for name in ("inputs", "memory"):
            pair = getattr(self, name)
            state[name], state[f"{name}_after"] = (pair[i].ctypes.data for i in (now, 1 - now))


def _current(state: Any) -> int:
    """Which of a memory's two the kernels read."""
    return int(state["memory"] > state["memory_after"])


class KeyValues:
    """Keys and values of all layers in half precision, growing as tokens come.

    A gated delta net keeps no keys and values, but a state of one size. What it was before the last
    step is kept beside it, so that a step can be taken back.

    Parameters
    ----------
    windows
        For every layer how many positions its attention sees, the token itself included; 0
        for all. What has left the window is forgotten when the buffer is full.

    Attributes
    ----------
    states
        What the kernels are given, a record of :data:`~.records.STATE` a layer.
    heads
        How many heads every layer holds, of all texts together; 0 before it holds any.
    held
        To what length every layer may be taken back, so that the window before that is not
        forgotten; :data:`FREE` where it is not to be taken back.

    Notes
    -----
    Several texts of one length are one sequence of more heads: a text's lie one behind another.
    """

    def __init__(self, windows: list[int]) -> None:
        self.states = np.zeros(len(windows), STATE)
        self.heads = np.zeros(len(windows), np.int64)
        self.held = np.full(len(windows), FREE, np.int64)
        self._windows = windows
        self._layers: list[_Layer | None] = [None] * len(windows)
        self._memories: dict[int, _Memory] = {}
        self._stepped = 0
        self._table = np.zeros(1, np.int64)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Point to the buffers of a copy, which lie elsewhere than those it was copied from."""
        self.__dict__.update(state)
        for layer, buffers in enumerate(self._layers):
            if buffers is not None:
                self._point(layer, buffers)
        for layer, memory in self._memories.items():
            memory.point(self.states[layer], _current(self.states[layer]))

    def length(self, layer: int) -> int:
        """How many positions the layer holds."""
        return int(self.states[layer]["length"])

    @property
    def capacity(self) -> int:
        """The most positions that any layer has room for."""
        capacity = self.states["capacity"]
        return int(capacity[capacity < FREE].max(initial=0))

    def store(self, layer: int, keys: F32, values: F32) -> None:
        """Replace what a layer holds by ``keys`` and ``values``, ``[H, T, dim]`` float32."""
        if keys.shape != values.shape or keys.ndim != 3:
            raise ShapeError(f"keys are {list(keys.shape)}, values {list(values.shape)}")
        heads, length, dim = keys.shape
        check_matrix("keys", keys, keys.shape)
        check_matrix("values", values, keys.shape)
        self._allocate(layer, heads, dim, length + 1)
        buffers = self._buffers(layer)
        with LOCK:
            pack_past(keys, values, buffers.keys, buffers.values)
        self.states[layer]["length"] = length

    def read(self, layer: int) -> tuple[F32, F32]:
        """Return what a layer holds as new arrays ``[H, T, dim]``."""
        buffers, length = self._buffers(layer), self.length(layer)
        heads, strips = buffers.values.shape[:2]
        whole, width = pad(length, TILE) // TILE, strips * TILE  # reshape infers nothing of nothing
        keys = _widen(buffers.keys[:, :whole].swapaxes(2, 3))
        keys = keys.reshape(heads, whole * TILE, buffers.dim)
        values = _widen(buffers.values[:, :, :length].swapaxes(1, 2)).reshape(heads, length, width)
        return (
            np.ascontiguousarray(keys[:, :length]),
            np.ascontiguousarray(values[:, :, : buffers.dim]),
        )

    def store_memory(self, layer: int, inputs: F32, memory: F32) -> None:
        """Replace the state of a gated delta net.

        Parameters
        ----------
        inputs
            The convolution's last ones, ``[texts, taps, channels]``.
        memory
            ``[texts, value_heads, key_dim, value_dim]``.
        """
        check_matrix("inputs", inputs, (None, None, None))
        check_matrix("memory", memory, (len(inputs), None, None, None))
        kept = _Memory(np.stack((inputs, inputs)), np.stack((memory, memory)))
        self._memories[layer] = kept
        state = self.states[layer]
        kept.point(state, 0)
        state["capacity"], self.heads[layer] = FREE, memory.shape[0] * memory.shape[1]

    def read_memory(self, layer: int) -> tuple[F32, F32]:
        """Return the state of a gated delta net as :meth:`store_memory` takes it, copied."""
        kept, now = self._memories[layer], _current(self.states[layer])
        return kept.inputs[now].copy(), kept.memory[now].copy()

    def drop(self, layer: int, count: int) -> None:
        """Forget the last ``count`` positions of a layer; of a state exactly the last step's."""
        memory = self._memories.get(layer)
        if memory is not None:
            if count != self._stepped:
                raise ShapeError(f"{count} positions of a state's last step of {self._stepped}")
            memory.point(self.states[layer], 1 - _current(self.states[layer]))
            return
        self.states[layer]["length"] = max(0, self.length(layer) - count)

    @property
    def beyond(self) -> bool:
        """Whether a number that tokens have written since was too large for half precision."""
        return bool(self.states["beyond"].any())

    @beyond.setter
    def beyond(self, value: bool) -> None:
        self.states["beyond"] = value

    def make_room(self, count: int = 1) -> None:
        """Give every layer room for ``count`` more positions."""
        for layer in np.flatnonzero(self.states["length"] + count > self.states["capacity"]):
            self.reserve(int(layer), count)

    def reserve(self, layer: int, count: int) -> None:
        """Give a layer room for ``count`` more positions."""
        if self.length(layer) + count > self.states[layer]["capacity"]:
            self._move(layer, count)

    def _move(self, layer: int, count: int) -> None:
        """Move a layer into larger buffers, or forget in whole strips what has left the window."""
        old, length, window = self._buffers(layer), self.length(layer), self._windows[layer]
        seen = min(length, int(self.held[layer])) - window + 1
        first = max(0, seen) // TILE if window else 0
        heads, strips = old.keys.shape[:2]
        start, stop = first * TILE, strips * TILE
        new = _made(heads, old.dim, length - start + count)
        new.keys[:, : strips - first] = old.keys[:, first:]
        new.values[:, :, : stop - start] = old.values[:, :, start:]
        self._take(layer, new, length - start)
        if self.held[layer] != FREE:
            self.held[layer] -= start

    def select(self, layer: int, heads: NDArray[np.int64]) -> None:
        """Keep these heads of a layer, in this order; some may come more than once."""
        old = self._buffers(layer)
        new = _Layer(old.keys[heads], old.values[heads], old.dim)
        self._take(layer, new, self.length(layer))

    def advance(self, count: int = 1) -> None:
        """Count the positions that a decode step has written."""
        states = self.states
        states["length"] += count
        if self._memories:
            self._stepped = count
            for name in ("inputs", "memory"):
                written = states[f"{name}_after"].copy()
                states[f"{name}_after"] = states[name]
                states[name] = written

    def advance_layer(self, layer: int, count: int) -> None:
        """Count ``count`` positions that one layer has written."""
        self.states[layer]["length"] += count

    def _buffers(self, layer: int) -> _Layer:
        buffers = self._layers[layer]
        if buffers is None:
            raise ShapeError(f"layer {layer} has no keys yet", hint="store some, even of length 0")
        return buffers

    def _allocate(self, layer: int, heads: int, dim: int, needed: int) -> None:
        old = self._layers[layer]
        same = old is not None and (old.keys.shape[0], old.dim) == (heads, dim)
        if not same or self.states[layer]["capacity"] < needed:
            self._take(layer, _made(heads, dim, needed), 0)

    def _take(self, layer: int, new: _Layer, length: int) -> None:
        """Give a layer other buffers, which are full up to a length."""
        self._layers[layer] = new
        self._point(layer, new)
        self.heads[layer] = new.keys.shape[0]
        self.states[layer]["capacity"] = new.values.shape[2]
        self.states[layer]["length"] = length

    def _point(self, layer: int, buffers: _Layer) -> None:
        """Tell the kernels where a layer's buffers lie."""
        state = self.states[layer]
        state["keys"] = buffers.keys.ctypes.data
        state["values"] = buffers.values.ctypes.data
        state["table"], state["page"] = self._table.ctypes.data, buffers.values.shape[2]


def _made(heads: int, dim: int, needed: int) -> _Layer:
    """Return empty buffers for ``needed`` positions and some more."""
    capacity = pad(needed + max(_STEP, needed // 4), _STEP)
    keys = np.zeros((heads, capacity // TILE, dim, TILE), np.uint16)
    values = np.zeros((heads, pad(dim, TILE) // TILE, capacity, TILE), np.uint16)
    return _Layer(keys, values, dim)


def _widen(bits: NDArray[np.uint16]) -> F32:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)
